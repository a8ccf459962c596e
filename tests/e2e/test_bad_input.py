"""Bad input gives one clear error that names file, found, expected and what to do; the exit code is not
zero; nothing hangs; nothing is left half-written."""
import json
import os
import shutil
import unittest

from common import STORIES, TINY, TOP, Case, main, pmpd, write_config

PROMPTS = TOP / "experiments" / "tasks" / "tiny_mixed.jsonl"


class BadInput(Case):
    def refused(self, *args, says, ranks=0):
        done = pmpd(*args, ok=False, timeout=60, ranks=ranks)
        error = done.stderr.decode(errors="replace")
        self.assertNotIn(done.returncode, (0, -11, -6, 139, 134), error)
        for part in [says] if isinstance(says, str) else says:
            self.assertIn(part, error)
        self.assertEqual(error.count("pmpd: error: "), 1, error)
        self.assertNotIn("Sanitizer", error)

    def model(self):
        copy = self.folder / "model"
        shutil.copytree(TINY, copy, ignore=shutil.ignore_patterns("train"))
        return copy

    def change_config(self, copy, **members):
        config = json.loads((copy / "config.json").read_text())
        config.update(members)
        (copy / "config.json").write_text(json.dumps(config))

    def run_config(self, **more):
        settings = {"model__path": TINY, "prompts__path": PROMPTS, "prompts__limit": 2,
                    "decode__max_new_tokens": 4, "output__dir": self.folder / "out"}
        settings.update(more)
        write_config(self.folder / "run.cfg", **settings)
        return self.folder / "run.cfg"

    # ---- models ----

    def test_truncated_weights(self):
        copy = self.model()
        weights = copy / "model.safetensors"
        data = weights.read_bytes()
        for keep in (0, 7, 100, len(data) // 2, len(data) - 1):
            weights.write_bytes(data[:keep])
            self.refused("perplexity", copy, PROMPTS, says="model.safetensors")

    def test_shapes_disagree(self):
        copy = self.model()
        self.change_config(copy, intermediate_size=448)
        self.refused("logits", copy, "--ids", "1", "--out", self.folder / "x.npy",
                     says=["gate_proj", "448", "512"])
        self.assertFalse((self.folder / "x.npy").exists())

    def test_refused_by_name(self):
        for member, says in (({"model_type": "mamba"}, "mamba"),
                             ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
                             ({"hidden_act": "relu"}, "relu")):
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            copy = self.model()
            self.change_config(copy, **member)
            self.refused("generate", copy, "--prompt", "x", says=["config.json", says])

    def test_missing(self):
        copy = self.model()
        (copy / "tokenizer.json").unlink()
        self.refused("generate", copy, "--prompt", "x", says="tokenizer.json")
        (copy / "config.json").unlink()
        self.refused("generate", copy, "--prompt", "x", says="config.json")
        self.refused("generate", self.folder / "nothing", "--prompt", "x", says="nothing")

    def test_json_damaged(self):
        copy = self.model()
        (copy / "config.json").write_text('{"model_type": "llama", ')
        self.refused("generate", copy, "--prompt", "x", says="config.json")

    # ---- runs ----

    def test_settings(self):
        self.refused("run", self.run_config(decode__slot=3), says=["run.cfg:", "decode.slot", "decode.slots"])
        self.refused("run", self.run_config(decode__slots=0), says=["decode.slots", "1"])
        self.refused("run", self.run_config(), "--set", "decode.slots=many", says=["decode.slots", "many"])
        self.refused("run", self.folder / "none.cfg", says="none.cfg")
        (self.folder / "run.cfg").write_text("decode: { slots = ; }")
        self.refused("run", self.folder / "run.cfg", says="run.cfg:1")

    def test_bits_not_held(self):
        self.refused("run", self.run_config(policy__level="4"), says=["level \"4\"", "pmpd quantize"])
        nested = self.folder / "nested"
        pmpd("quantize", TINY, nested, "--bits", "2,3")
        self.refused("run", self.run_config(model__path=nested, policy__level="4"), says="they hold 2, 3")
        self.refused("generate", nested, "--prompt", "x", "--bits", "8", says="they hold 2, 3")

    def test_prompts(self):
        bad = self.folder / "bad.jsonl"
        bad.write_text("")
        self.refused("run", self.run_config(prompts__path=bad), says="bad.jsonl")
        bad.write_text('{"id": 1, "turns": ["a"]}\n{"id": 2, "turns": "a"}\n')
        self.refused("run", self.run_config(prompts__path=bad), says="bad.jsonl:2")
        bad.write_text('{"id": "long", "turns": ["' + "word " * 600 + '"]}\n')
        self.refused("run", self.run_config(prompts__path=bad), says=["long", "512"])
        self.refused("run", self.run_config(prompts__path=self.folder / "no.jsonl"), says="no.jsonl")
        self.refused("run", self.run_config(prompts__split="train"), says=["train", "test"])
        self.assertFalse((self.folder / "out" / "run.h5").exists())

    def test_ranks_that_do_not_fit(self):
        self.refused("run", self.run_config(parallel__tensor_ranks=9), ranks=9, says="use 1 to 8; 1, 2, 4 and 8 share")
        self.refused("run", self.run_config(parallel__tensor_ranks=2), ranks=3, says="tensor_ranks")

    def test_unwritable_directory(self):
        (self.folder / "file").write_text("")
        self.refused("run", self.run_config(output__dir=self.folder / "file" / "out"), says="file/out")
        self.refused("run", self.run_config(output__dir=self.folder / "file" / "out"), ranks=2, says="file/out")

    def test_foreign_journal(self):
        (self.folder / "out").mkdir()
        journal = self.folder / "out" / "journal.bin"
        journal.write_bytes(b"something else, more than a frame long, that is not ours")
        self.refused("run", self.run_config(), says="journal.bin")
        self.assertTrue(journal.read_bytes().startswith(b"something else"))

    # ---- quantize, logits, perplexity ----

    def test_quantize(self):
        out = self.folder / "nested"
        self.refused("quantize", TINY, out, "--group", "48", says="48")
        self.refused("quantize", TINY, out, "--bits", "2,7", says="7")
        self.assertFalse(out.exists())
        out.mkdir()
        self.refused("quantize", TINY, out, says="nested")
        self.assertEqual(os.listdir(out), [])

    def test_words(self):
        self.refused("logits", TINY, "--ids", "1,99999", "--out", self.folder / "x.npy", says="99999")
        self.refused("logits", TINY, "--ids", "1", "--out", self.folder / "no" / "x.npy", says="x.npy")
        self.refused("generate", TINY, says="--prompt")
        self.refused("generate", TINY, "--prompt", "x", "-n", "-3", says="-3")
        self.refused("generate", TINY, "--prompt", "x", "--frob", says="--frob")
        self.refused("perplexity", TINY, self.folder / "none.txt", says="none.txt")
        self.refused("inspect", self.folder, says="config.json")
        self.refused("inspect", PROMPTS, says="tiny_mixed.jsonl")
        done = pmpd("frobnicate", ok=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn("unknown subcommand", done.stderr.decode())

    @unittest.skipUnless(STORIES and STORIES.exists(), "no PMPD_TEST_DATA")
    def test_group_does_not_fit_ranks(self):
        nested = self.folder / "nested"
        pmpd("quantize", STORIES, nested, "--group", "64")
        self.refused("perplexity", nested, STORIES / "eval.json", ranks=2, says="tensor ranks")


if __name__ == "__main__":
    main()

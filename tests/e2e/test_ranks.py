"""The same tokens for every number of replicas, threads and slots; tensor ranks agree to rounding."""
import json

import numpy as np

from common import TINY, TOP, Case, logits, main, nmse, pmpd, read_run, result, write_config

PROMPTS = TOP / "experiments" / "tasks" / "tiny_mixed.jsonl"


class Ranks(Case):
    def run_one(self, name, model, ranks, tensor_ranks, **more):
        out = self.folder / name
        settings = {"model__path": model, "prompts__path": PROMPTS, "prompts__limit": 8,
                    "decode__max_new_tokens": 40, "decode__slots": 3, "output__dir": out,
                    "parallel__tensor_ranks": tensor_ranks, "policy__name": "static",
                    "policy__switches": "0:max 10:max", "backend__threads": 1}
        settings.update(more)
        write_config(self.folder / "run.cfg", **settings)
        pmpd("run", self.folder / "run.cfg", ranks=ranks)
        return read_run(out)

    def same_tokens(self, a, b):
        self.assertEqual(a.keys(), b.keys())
        for key in a:
            self.assertEqual(a[key]["tokens"], b[key]["tokens"], key)
            self.assertEqual(a[key]["levels"], b[key]["levels"], key)

    def same_bits(self, a, b):
        self.same_tokens(a, b)
        for key in a:
            np.testing.assert_array_equal(a[key]["logprob"], b[key]["logprob"])
            np.testing.assert_array_equal(a[key]["entropy"], b[key]["entropy"])

    def test_replicas_threads_slots(self):
        nested = self.folder / "nested"
        pmpd("quantize", TINY, nested)
        plan = {"policy__switches": "0:4 10:3 20:2", "policy__prefill": "4"}
        one = self.run_one("one", nested, 1, 1, **plan)
        self.assertEqual(len(one), 8)
        self.same_bits(one, self.run_one("four", nested, 4, 1, **plan))
        self.same_bits(one, self.run_one("threads", nested, 1, 1, backend__threads=2, **plan))
        self.same_bits(one, self.run_one("slots", nested, 2, 1, decode__slots=8, **plan))
        self.same_bits(self.run_one("tensor", nested, 2, 2, **plan),
                       self.run_one("two_by_two", nested, 4, 2, **plan))

    def test_sampling_is_replica_invariant(self):
        warm = {"decode__temperature": 0.9, "decode__seed": 11, "policy__switches": "0:max"}
        one = self.run_one("one", TINY, 1, 1, **warm)
        self.same_bits(one, self.run_one("three", TINY, 3, 1, **warm))
        other = self.run_one("seed", TINY, 1, 1, **{**warm, "decode__seed": 12})
        self.assertNotEqual([v["tokens"] for v in one.values()], [v["tokens"] for v in other.values()])

    def test_tensor_ranks_agree(self):
        """Teacher-forced log-probabilities and logits agree to fp32 rounding."""
        rows = [json.loads(line)["turns"][0] for line in PROMPTS.read_text().splitlines()[:2]]
        text = self.folder / "text.txt"
        text.write_text("\n".join(rows))
        one = result("perplexity", TINY, text, "--kv", "f32")
        ids = list(range(4, 260, 7))
        base = logits(TINY, ids, "--kv", "f32")
        for ranks in (2, 4):
            several = result("perplexity", TINY, text, "--kv", "f32", ranks=ranks)
            self.assertAlmostEqual(one["nll"], several["nll"], places=5)
            self.assertLess(nmse(logits(TINY, ids, "--kv", "f32", ranks=ranks), base), 1e-11)

    def test_reproducible_tensor_ranks(self):
        """parallel.reproducible: the same bits on 1, 2 and 4 tensor ranks."""
        nested = self.folder / "nested"
        pmpd("quantize", TINY, nested)
        plan = {"policy__switches": "0:4 10:2", "policy__prefill": "4", "parallel__reproducible": True}
        one = self.run_one("one", nested, 1, 1, **plan)
        for ranks in (2, 4):
            self.same_bits(one, self.run_one(f"t{ranks}", nested, ranks, ranks, **plan))


if __name__ == "__main__":
    main()

"""The same bits, whatever shares the machine: tokens, log-probabilities, entropies, margins, levels and KV
features of every prompt compared as bits between numbers of tensor ranks, replicas, threads and slots, as far
as parallel.reproducible and the named products promise. Ends with one table of what was held fixed, what
varied, and whether all runs were equal. The part with a model trained elsewhere needs PMPD_TEST_DATA."""
import json
import shutil
import subprocess
import sys
import time
import unittest

import h5py
import numpy as np

from common import PMPD, STORIES, TINY, TOP, Case, environment, logits, main, pmpd, result, write_config

FAMILIES = TOP / "tests" / "golden" / "families"
PLAN = {"policy__name": "static", "policy__prefill": "4", "policy__switches": "0:4 7:3 14:2"}
PROMPTS = [
    ["Once upon a time there was a dog.", "What did the dog do?"], ["The weather is"], ["1 + 1 ="],
    ["Lily and Tom went to the park. They saw a big red ball and wanted to play with it. " * 3], ["A"],
    ["Where is the library?", "And the market?", "Why?"], ["Tobin: Hi Ruth, do you want to sell old books?"],
    ["I will bring a pillow."], ["One day the cat said:"]]
BITS = ("logprob", "entropy", "margin")
table = []


def read_bits(directory):
    """{(prompt, turn or "KV"): {name: array of integers}}: floats as their bits, so that equal means equal."""
    out = {}
    with h5py.File(directory / "run.h5", "r") as run:
        prompts, steps, kv = run["prompts"][:], run["steps"][:], run["kv_features"]
        for p in prompts:
            mine = steps[(steps["prompt"] == p["prompt"]) & (steps["turn"] == p["turn"])]
            mine = mine[np.argsort(mine["step"])]
            record = {"tokens": np.append(p["token0"], mine["token"]), "levels": mine["level"]}
            for name in BITS:
                record[name] = np.append(p[name + "0"], mine[name]).astype(np.float32).view(np.uint32)
            out[int(p["prompt"]), int(p["turn"])] = record
        for i, prompt in enumerate(kv["prompt"][:]):
            values = kv["values"][kv["offset"][i]:kv["offset"][i + 1]]
            out[int(prompt), "KV"] = {"features": np.ascontiguousarray(values, np.float32).view(np.uint32)}
        n_gathered = int(run["passes"]["n_gathered"].sum())
    return out, n_gathered


def difference(a, b):
    """None, or where two dictionaries of dictionaries of arrays first differ."""
    if a.keys() != b.keys():
        return f"prompts {sorted(map(str, a.keys() ^ b.keys()))} are in one only"
    for key, record in a.items():
        for name, values in record.items():
            other = b[key][name]
            if values.shape != other.shape:
                return f"{key}: {len(values)} and {len(other)} {name}"
            if not np.array_equal(values, other):
                return f"{key}: {name} differ first at {np.argwhere(values != other)[0].tolist()}"
    return None


class Exactness(Case):
    def setUp(self):
        super().setUp()
        (self.folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"turns": turns}) + "\n" for turns in PROMPTS))

    @classmethod
    def tearDownClass(cls):
        head = ("model", "held fixed", "varies", "runs", "tokens", "equal", "s")
        width = [max(len(row[i]) for row in table + [head]) for i in range(len(head))]
        for row in [head] + table:
            print("  ".join(text.ljust(n) for text, n in zip(row, width)).rstrip())

    def nested(self, model, *args):
        out = self.folder / (model.name + "-nested")
        pmpd("quantize", model, out, *args)
        return out

    def random_model(self, name, shape, family):
        out = self.folder / name
        subprocess.run([sys.executable, TOP / "experiments" / "random_model.py", shape, out, "--family", family],
                       check=True, stdout=subprocess.DEVNULL)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / file, out)
        return out

    def run_once(self, model, tensor=1, replicas=1, threads=1, slots=4, out=None, **more):
        config, keep, out = self.folder / "run.cfg", out, out or self.folder / "out"
        settings = {"model__path": model, "prompts__path": self.folder / "prompts.jsonl", "output__dir": out,
                    "output__kv_features": True, "decode__max_new_tokens": 20, "decode__context": 256,
                    "decode__prefill_chunk": 16, "decode__slots": slots, "backend__threads": threads,
                    "parallel__tensor_ranks": tensor, "parallel__reproducible": True}
        write_config(config, **{**settings, **more})
        pmpd("run", config, ranks=tensor * replicas)
        found = read_bits(out)
        if not keep:
            shutil.rmtree(out)
        return found

    def note(self, model, fixed, varies, runs, n_tokens, differences, start):
        table.append((model, fixed, varies, str(runs), str(n_tokens), "NO" if differences else "yes",
                      f"{time.time() - start:.1f}"))
        self.assertEqual(differences, [])

    def check(self, name, model, fixed, runs, **common):
        """Runs that differ in what `runs` says; returns how many tokens each had to gather all logits for."""
        start, first, differences, gathered, n_tokens = time.time(), None, [], [], 0
        for varied in runs:
            found, n_gathered = self.run_once(model, **{**common, **varied})
            gathered.append(n_gathered)
            n_tokens += sum(len(r["tokens"]) for r in found.values() if "tokens" in r)
            first = first or found
            where = difference(first, found)
            differences += [(runs[0], varied, where)] if where else []
        self.assertGreater(len(first), len(PROMPTS))
        self.assertGreater(n_tokens, 20 * len(runs))
        keys = list(dict.fromkeys(k for varied in runs for k in varied))
        varies = ", ".join(f"{k} " + "/".join(str(v) for v in dict.fromkeys(
            r.get(k, common.get(k, 4 if k == "slots" else 1)) for r in runs)) for k in keys)
        self.note(name, fixed, varies, len(runs), n_tokens, differences, start)
        return gathered, n_tokens // len(runs)

    def test_stories(self):
        if not STORIES:
            self.skipTest("PMPD_TEST_DATA is not set")
        nested = self.nested(STORIES, "--group", 32)
        self.check("stories260k fp32", STORIES, "8 segments, 4 slots", [{"tensor": n} for n in (1, 2, 3, 5, 8)])
        self.check("stories260k nested", nested, "8 segments, 4 slots, 4-3-2 bits",
                   [{"tensor": n} for n in (1, 2)], **PLAN)

    def test_embedded(self):
        nested = self.nested(TINY)
        self.check("embedded fp16", TINY, "8 segments, 4 slots", [{"tensor": n} for n in (1, 2, 3, 4)])
        self.check("embedded nested", nested, "8 segments, 4 slots, 4-3-2 bits",
                   [{"tensor": n} for n in (1, 2, 3, 4)], **PLAN)
        self.check("embedded nested", nested, "8 segments, 1 slot: product ONE",
                   [{}, {"replicas": 2}, {"replicas": 3, "threads": 2}, {"tensor": 3, "replicas": 2}],
                   slots=1, **PLAN)
        plain = {"parallel__reproducible": False, **PLAN}
        self.check("embedded nested", nested, "1 tensor rank: product SLOTS",
                   [{"slots": 4}, {"slots": 8}, {"replicas": 2, "threads": 2}, {"replicas": 3, "slots": 3},
                    {"threads": 2, "slots": 8}], **plain)
        self.check("embedded nested", nested, "3 tensor ranks",
                   [{"slots": 4}, {"replicas": 2, "slots": 8, "threads": 2}], tensor=3, **plain)

    def test_sampling(self):
        """Restricted sampling: the ranks' candidates, and all logits where these do not settle it."""
        warm = {"decode__temperature": 0.9, "decode__seed": 11, "decode__top_p": 0.9, "decode__top_k": 40}
        self.check("embedded fp16", TINY, "8 segments, top-k 40, top-p 0.9",
                   [{}, {"tensor": 3}, {"replicas": 2, "slots": 7}], **warm)
        self.check("embedded fp16", TINY, "8 segments, temperature 0.9",
                   [{}, {"tensor": 4}, {"replicas": 3}], decode__temperature=0.9)
        hot = {"decode__temperature": 4.0, "decode__seed": 5, "decode__top_p": 0.95, "decode__min_p": 0.001}
        gathered, n_tokens = self.check("embedded fp16", TINY, "8 segments, min-p, temperature 4",
                                        [{}, {"tensor": 2}, {"tensor": 4}, {"replicas": 2, "slots": 7}], **hot)
        self.assertGreater(gathered[0], n_tokens // 2)  # one rank's candidates do not suffice
        self.assertLessEqual(gathered[2], gathered[0])  # four ranks offer more
        self.assertEqual(gathered[0], gathered[3])

    def test_uneven(self):
        """Heads that no number of ranks shares evenly, KV heads that several ranks hold."""
        six = self.random_model("six", "192,320,2,6,2,1536", "llama")
        sizes = [{"tensor": n} for n in (1, 2, 3, 5, 6)]
        self.check("6 heads, 2 KV heads, fp16", six, "8 segments, 4 slots", sizes)
        self.check("6 heads, 2 KV heads, nested", self.nested(six, "--group", 32), "8 segments, 4-3-2 bits", sizes,
                   **PLAN)
        refused = pmpd("perplexity", six, "none.txt", "--segments", 8, ranks=7, ok=False).stderr.decode()
        self.assertIn("7 tensor ranks do not fit this model", refused)
        self.assertIn("use 1 to 6; 1, 2, 3 and 6 share the attention evenly", refused)
        # seven query heads to a KV head, units of two heads: one unit has heads of both groups
        qwen = self.nested(self.random_model("qwen", "224,448,2,14,2,1536", "qwen2"), "--group", 32)
        self.check("14 heads, 2 KV heads, qwen2", qwen, "8 segments, 4-3-2 bits",
                   [{"tensor": n} for n in (1, 3, 4, 7)], **PLAN)

    def test_logits(self):
        """Prefill and scoring, other families (biases, layer norm, parallel blocks), the oracle."""
        for name, backend in (("phi", "cpu"), ("stablelm-parallel", "cpu"), ("qwen2-tied", "cpu_ref")):
            start, folder = time.time(), FAMILIES / name
            ids = json.loads((folder / "ids.json").read_text())
            found = [logits(folder, ids, "--segments", 4, "--backend", backend, ranks=n) for n in (1, 3, 4)]
            differences = [n for n, f in zip((3, 4), found[1:])
                           if not np.array_equal(f.view(np.uint32), found[0].view(np.uint32))]
            self.note(name, f"logits, 4 segments, {backend}", "tensor 1/3/4", 3, 3 * len(ids), differences, start)
        start, text, n_tokens = time.time(), self.folder / "text.txt", 0
        text.write_text("".join(turns[0] + "\n" for turns in PROMPTS))
        differences = []
        for plan in ([], ["--plan", "prefill:max 0:max"]):
            scores = [result("perplexity", TINY, text, "--window", 64, "--segments", 8, *plan, ranks=n)
                      for n in (1, 3)]
            n_tokens += sum(s["tokens"] for s in scores)
            differences += [s for s in scores if s["nll"] != scores[0]["nll"]]
        self.note("embedded fp16", "perplexity, prefill and decode", "tensor 1/3", 4, n_tokens, differences, start)

    def test_mixed_machines(self):
        """Ranks that compute in different ways are no one replica and no two of one run."""
        text = self.folder / "text.txt"
        text.write_text("The weather is bad. " * 4)
        parts = [[PMPD, "perplexity", TINY, text, "--backend", name] for name in ("cpu", "cpu_ref")]
        done = subprocess.run(["mpirun", "-n", "1", *parts[0], ":", "-n", "1", *parts[1]], env=environment(),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
        self.assertNotEqual(done.returncode, 0)
        self.assertRegex(done.stderr.decode(), r"rank 1: the arithmetic is cpu_ref scalar here and cpu \w+ on rank 0")

    def test_resume_on_other_ranks(self):
        """What three tensor ranks left over two replicas of one take up; nothing is decoded again."""
        start, shared = time.time(), self.folder / "shared"
        whole, _ = self.run_once(TINY)
        self.run_once(TINY, out=shared, tensor=3, prompts__limit=4)
        resumed, _ = self.run_once(TINY, out=shared, replicas=2)
        with h5py.File(shared / "run.h5", "r") as run:
            epochs = run["passes"]["epoch"][run["steps"]["pass"]]
            self.assertEqual(set(epochs[run["steps"]["prompt"] < 4]), {0})
            self.assertEqual(set(epochs[run["steps"]["prompt"] >= 4]), {1})
        where = difference(whole, resumed)
        n_tokens = sum(len(r["tokens"]) for r in resumed.values() if "tokens" in r)
        self.note("embedded fp16", "8 segments, 4 slots", "whole / tensor 3, then 2 replicas", 3, 2 * n_tokens,
                  [where] if where else [], start)


if __name__ == "__main__":
    main()

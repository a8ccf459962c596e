"""The same tokens for every number of replicas, threads and slots; tensor ranks agree to rounding."""
import json

import h5py
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

    def gathered(self, name):
        with h5py.File(self.folder / name / "run.h5", "r") as run:
            return int(run["passes"]["n_gathered"].sum())

    def test_restricted_sampling(self):
        """top-p over 1, 2 and 4 vocabulary parts: the same bits, with logits gathered where it must be."""
        filtered = {"decode__temperature": 1.0, "decode__seed": 5, "decode__top_p": 0.9,
                    "policy__switches": "0:max", "parallel__reproducible": True}
        hot = {**filtered, "decode__temperature": 4.0, "decode__top_p": 0.95, "decode__min_p": 0.001}
        for name, settings in (("warm", filtered), ("hot", hot)):
            one = self.run_one(f"{name}1", TINY, 1, 1, **settings)
            for ranks in (2, 4):
                self.same_bits(one, self.run_one(f"{name}{ranks}", TINY, ranks, ranks, **settings))
            self.same_bits(one, self.run_one(f"{name}slots", TINY, 2, 1, decode__slots=7, **settings))
        n_tokens = sum(len(v["tokens"]) for v in one.values())
        print("gathered of", n_tokens, "hot tokens:", [self.gathered(f"hot{r}") for r in (1, 2, 4)])
        self.assertGreater(self.gathered("hot1"), n_tokens // 2)
        self.assertGreaterEqual(self.gathered("hot1"), self.gathered("hot4"))
        self.assertLess(self.gathered("warm1"), n_tokens // 10)

    def test_filters_of_generate(self):
        """One id left is greedy; every filter changes what a hot sampler says."""
        def ids(*more):
            return result("generate", TINY, "--prompt", "1 + 1 =", "-n", 24, *more)["ids"]
        hot = ["--temperature", 3, "--seed", 9]
        greedy = ids()
        self.assertEqual(ids(*hot, "--top-k", 1), greedy)
        self.assertEqual(ids(*hot, "--top-p", 0.000001), greedy)
        self.assertEqual(ids(*hot, "--min-p", 1), greedy)
        said = {tuple(ids(*hot, *f)) for f in ([], ["--top-k", 3], ["--top-p", 0.6], ["--min-p", 0.3])}
        self.assertEqual(len(said), 4)
        self.assertIn(b"from 0 to 1", pmpd("generate", TINY, "--prompt", "a", "--top-p", "1.5", ok=False).stderr)


if __name__ == "__main__":
    main()

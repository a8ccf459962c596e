"""A model trained elsewhere (stories260K) against reference outputs of an independent fp32 engine:
greedy ids of every prompt and step, first-step logits, perplexity."""
import json
import unittest

import numpy as np

from common import STORIES, Case, logits, main, result


@unittest.skipUnless(STORIES and STORIES.exists(), "no PMPD_TEST_DATA")
class Reference(Case):
    def setUp(self):
        super().setUp()
        self.cases = json.loads((STORIES / "reference.json").read_text())["cases"]

    def check_greedy(self, backend):
        for case in self.cases:
            n = len(case["greedy_ids"])
            got = result("generate", STORIES, "--prompt", case["prompt"], "-n", n, "--kv", "f32", "--backend",
                         backend)
            self.assertEqual(got["prompt_ids"], case["prompt_ids"])
            self.assertEqual(got["ids"], case["greedy_ids"], case["prompt"])

    def test_greedy_ids_cpu(self):
        self.check_greedy("cpu")

    def test_greedy_ids_oracle(self):
        self.check_greedy("cpu_ref")

    def test_first_step_logits(self):
        for case in self.cases:
            key = next(k for k in case if "logits" in k)
            for backend in ("cpu", "cpu_ref"):
                got = logits(STORIES, case["prompt_ids"], "--kv", "f32", "--backend", backend)[-1]
                self.assertLessEqual(np.abs(got - np.array(case[key])).max(), 1e-4)

    def test_perplexity(self):
        want = json.loads((STORIES / "eval.json").read_text())["fp32_perplexity"]
        got = result("perplexity", STORIES, STORIES / "eval.json", "--kv", "f32")["perplexity"]
        self.assertLessEqual(abs(got / want - 1), 1e-3)

    def test_perplexity_through_decode(self):
        """The decode path scores what the prefill path scores."""
        rows = json.loads((STORIES / "eval.json").read_text())["ids"][:4]
        short = self.folder / "short.json"
        short.write_text(json.dumps({"ids": rows, "first_scored_position": 32}))
        prefill = result("perplexity", STORIES, short, "--kv", "f32")
        decode = result("perplexity", STORIES, short, "--kv", "f32", "--plan", "0:max")
        self.assertEqual(prefill["tokens"], decode["tokens"])
        self.assertAlmostEqual(prefill["nll"], decode["nll"], places=5)


if __name__ == "__main__":
    main()

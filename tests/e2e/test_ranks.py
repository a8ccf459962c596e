"""Tensor ranks without parallel.reproducible agree to rounding; what the sampling filters do; too many
threads."""
import json
import os
import unittest.mock

from common import TINY, TOP, Case, logits, main, nmse, pmpd, result

PROMPTS = TOP / "experiments" / "tasks" / "tiny_mixed.jsonl"


class Ranks(Case):
    def test_tensor_ranks_agree(self):
        """Teacher-forced log-probabilities and logits agree to fp32 rounding."""
        rows = [json.loads(line)["turns"][0] for line in PROMPTS.read_text().splitlines()[:2]]
        text = self.folder / "text.txt"
        text.write_text("\n".join(rows))
        one = result("perplexity", TINY, text, "--kv", "f32")
        ids = list(range(4, 260, 7))
        base = logits(TINY, ids, "--kv", "f32")
        for ranks in (2, 3, 4):
            several = result("perplexity", TINY, text, "--kv", "f32", ranks=ranks)
            self.assertAlmostEqual(one["nll"], several["nll"], places=5)
            self.assertLess(nmse(logits(TINY, ids, "--kv", "f32", ranks=ranks), base), 1e-11)

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
        self.assertNotIn(tuple(ids("--temperature", 3, "--seed", 10)), said)
        self.assertIn(b"from 0 to 1", pmpd("generate", TINY, "--prompt", "a", "--top-p", "1.5", ok=False).stderr)

    def test_more_threads_than_cpus(self):
        """Said once, with the way out, but not to those whose threads wait passively."""
        n = len(os.sched_getaffinity(0))
        asked = ["generate", TINY, "--prompt", "a", "-n", 4]
        for threads, waiting, warns in ((1, "active", n < 2), (n, "active", True), (n, "passive", False)):
            with unittest.mock.patch.dict(os.environ, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY=waiting):
                done = pmpd(*asked, ranks=2)
            error = done.stderr.decode()
            self.assertEqual(error.count(f"2 ranks of this node run {2 * threads} threads on {n} CPUs"), warns, error)
            self.assertEqual("Set backend.threads" in error, warns)


if __name__ == "__main__":
    main()

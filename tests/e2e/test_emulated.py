"""The cuda backend's kernels, run on the host, in the whole program: the embedded model against
cpu_ref, teacher-forced, and decoding the same tokens from run to run and on two tensor ranks."""
import json
import subprocess

import h5py
import numpy as np

from common import BUILD, TINY, Case, environment, logits, main, nmse, pmpd, read_run, write_config

EMULATED = str(BUILD / "tests" / "pmpd_emulated")
IDS = [1, 300, 17, 4, 90, 260, 5, 33, 411, 7]


class Emulated(Case):
    def setUp(self):
        super().setUp()
        self.nested = self.folder / "nested"
        pmpd("quantize", TINY, self.nested)

    def emulated_logits(self, model, ids, *args, ranks=0):
        out = self.folder / "logits.npy"
        mpirun = ["mpirun", "-n", str(ranks)] if ranks else []
        subprocess.run([*mpirun, EMULATED, "logits", model, "--ids", ",".join(map(str, ids)), "--out", out,
                        "--backend", "cuda-emulated", *args], env=environment(), check=True, timeout=300,
                       stdin=subprocess.DEVNULL, capture_output=True)
        return np.load(out)

    def agree(self, got, want):
        """arg-max wherever the two largest are more than 1 % of a standard deviation apart."""
        self.assertLess(nmse(got, want), 1e-5)
        top = np.sort(want, axis=-1)
        clear = top[:, -1] - top[:, -2] > 0.01 * want.std(axis=-1)
        self.assertGreater(clear.sum(), len(want) // 2)
        np.testing.assert_array_equal(got.argmax(-1)[clear], want.argmax(-1)[clear])

    def test_teacher_forced(self):
        for model, bits in ((TINY, ()), (self.nested, ("--bits", "4")), (self.nested, ("--bits", "2"))):
            want = logits(model, IDS, "--kv", "f16", "--backend", "cpu_ref", *bits)
            self.agree(self.emulated_logits(model, IDS, "--kv", "f16", *bits), want)

    def test_two_tensor_ranks(self):
        """Ranks that exchange through the host."""
        want = logits(self.nested, IDS, "--kv", "f16", "--backend", "cpu_ref", "--bits", "3")
        self.agree(self.emulated_logits(self.nested, IDS, "--kv", "f16", "--bits", "3", ranks=2), want)

    def run_one(self, name, seed, **more):
        out = self.folder / name
        prompts = self.folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"turns": [t]}) + "\n" for t in ("1 + 1 =", "Task: story")))
        write_config(self.folder / "run.cfg", **{
            "model__path": self.nested, "prompts__path": prompts, "decode__max_new_tokens": 4, "decode__slots": 2, "output__dir": out,
            "decode__temperature": 0.7, "policy__name": "static", "policy__switches": "0:4 2:2",
            "policy__prefill": "4", "backend__name": "cuda-emulated", **more})
        subprocess.run([EMULATED, "run", self.folder / "run.cfg"], check=True, timeout=300,
                       env={**environment(), "PMPD_EMULATE_SEED": str(seed)}, stdin=subprocess.DEVNULL, capture_output=True)
        return read_run(out)

    def test_run_to_run(self):
        """The same bits with blocks and threads in another order."""
        one, again = self.run_one("one", 1), self.run_one("again", 2)
        for key in one:
            self.assertEqual(one[key]["tokens"], again[key]["tokens"])
            np.testing.assert_array_equal(one[key]["logprob"], again[key]["logprob"])

    def test_signals(self):
        """What passes measure, and a probe's divergence, from a device's memory: as on the oracle."""
        more = {"policy__name": "error-feedback", "policy__levels": "4 2", "policy__every": 2, "decode__slots": 1,
                "decode__temperature": 0.0, "output__signals": True, "decode__stop_at_eos": False,
                "decode__max_new_tokens": 3, "prompts__limit": 1}
        one = self.run_one("one", 1, **more)
        config = (self.folder / "run.cfg").read_text().replace("cuda-emulated", "cpu_ref").replace("/one", "/ref")
        (self.folder / "run.cfg").write_text(config)
        pmpd("run", self.folder / "run.cfg")
        self.assertEqual([r["tokens"] for r in one.values()],
                         [r["tokens"] for r in read_run(self.folder / "ref").values()])
        with h5py.File(self.folder / "one" / "run.h5") as a, h5py.File(self.folder / "ref" / "run.h5") as b:
            for name in ("max_prob", "probe_kl", "hidden_mean", "hidden_rms", "k_norm", "v_norm"):
                x, y = a["steps"][name], b["steps"][name]
                self.assertFalse(np.isnan(y).all(), name)
                np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4, err_msg=name)


if __name__ == "__main__":
    main()

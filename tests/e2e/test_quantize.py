"""The joint quantiser with calibration, on a model trained elsewhere and on the embedded one: quality
against an independent NumPy implementation of the same method, resuming, baselines, bad options."""
import json
import os
import signal
import subprocess
import time
import unittest

import numpy as np

from common import STORIES, TINY, TOP, Case, command, environment, logits, main, nmse, pmpd, result

# Perplexity at 2, 3, 4 bits of the NumPy implementation (joint, groups of 32, calibrated on calib.json,
# scored on eval.json); how much worse pmpd may be. The 2-bit model is near its end: it swings more.
REFERENCE = {"tied": (18.17, 3.711, 2.960), "free": (13.40, 3.706, 2.937)}
ALLOWED = (1.10, 1.02, 1.02)


def perplexity(model, text, bits, *args):
    return result("perplexity", model, text, "--bits", bits, *args)["perplexity"]


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@unittest.skipUnless(STORIES and STORIES.exists(), "no PMPD_TEST_DATA")
class Stories(Case):
    def quantize(self, name, *args):
        out = self.folder / name
        return out, result("quantize", STORIES, out, "--group", 32, *args)

    def test_quality(self):
        for alphas, reference in REFERENCE.items():
            out, report = self.quantize(alphas, "--calib", STORIES / "calib.json", "--alphas", alphas)
            self.assertEqual(report["method"], "joint")
            got = [perplexity(out, STORIES / "eval.json", b, "--kv", "f32") for b in (2, 3, 4)]
            print(alphas, "2, 3, 4 bits:", *(f"{p:.3f} ({r})" for p, r in zip(got, reference)))
            for p, r, allowed in zip(got, reference, ALLOWED):
                self.assertLessEqual(p, allowed * r, f"{alphas}: {got}")
            config = json.loads((out / "config.json").read_text())["quantization_config"]
            self.assertEqual(config["method"], "joint")
            self.assertEqual(config["calibration"]["tokens"], 48 * 256)
            self.assertEqual(config["calibration"]["sweeps"], 1)

    def test_tail(self):
        """8 bits on top of 4: next to the unquantised model (2.776); 2.777 in the reference."""
        out, _ = self.quantize("tail", "--calib", STORIES / "calib.json", "--tail", 8)
        self.assertLessEqual(perplexity(out, STORIES / "eval.json", 8, "--kv", "f32"), 2.777 * 1.002)
        self.assertLessEqual(perplexity(out, STORIES / "eval.json", 4, "--kv", "f32"), 2.960 * 1.02)


class Embedded(Case):
    """A model of our own: a few documents as calibration text are enough to see what is asked here."""

    def setUp(self):
        super().setUp()
        tasks = TOP / "experiments" / "tasks"
        self.calib = self.folder / "calib.txt"
        self.calib.write_text("\n\n".join((tasks / "tiny_calib.txt").read_text().split("\n\n")[:24]))
        self.eval = self.folder / "eval.json"
        rows = json.loads((tasks / "tiny_test_ids.json").read_text())["ids"][:30]
        self.eval.write_text(json.dumps({"ids": rows}))
        self.calib_ids = self.folder / "calib.json"
        rows = json.loads((tasks / "tiny_calib_ids.json").read_text())["ids"][:60]
        self.calib_ids.write_text(json.dumps({"ids": rows}))

    def test_baselines(self):
        """Every method makes a model that decodes; joint with data is best of the nested ones at every
        precision, and level with GPTQ, which is not nested."""
        scores = {}
        for name, args in {"joint": ["--calib", self.calib_ids], "rtn": ["--method", "rtn"],
                           "bcq-greedy": ["--method", "bcq-greedy"], "kmeans": ["--method", "kmeans"]}.items():
            report = result("quantize", TINY, self.folder / name, *args)
            self.assertEqual(report["method"], name)
            scores[name] = [perplexity(self.folder / name, self.eval, b) for b in (2, 3, 4)]
        for bits in (2, 3, 4):
            out = self.folder / f"gptq-{bits}"
            report = result("quantize", TINY, out, "--method", "gptq", "--bits", bits, "--calib", self.calib_ids)
            self.assertEqual(report["layers"]["read_bits_per_weight"].keys(), {str(bits)})
            scores.setdefault("gptq", []).append(perplexity(out, self.eval, bits))
        print({k: [round(p, 4) for p in v] for k, v in scores.items()})
        for name in ("rtn", "bcq-greedy", "kmeans"):
            for joint, other in zip(scores["joint"], scores[name]):
                self.assertLess(joint, other, name)
        for joint, other in zip(scores["joint"], scores["gptq"]):
            self.assertLess(joint, 1.01 * other, "gptq")

    def test_threads(self):
        for threads in (1, 3):
            pmpd("quantize", TINY, self.folder / f"t{threads}", "--calib", self.calib, "--threads", threads,
                 "--head-bits", "2,3,4", "--tail", 8)
        self.assertEqual(files(self.folder / "t1"), files(self.folder / "t3"))

    def test_ranks(self):
        """Rows shared out over ranks: the same folder byte for byte; a failure of one ends all."""
        for ranks in (1, 3):
            pmpd("quantize", TINY, self.folder / f"r{ranks}", "--calib", self.calib, "--head-bits", "2,3,4",
                 "--tail", 8, ranks=ranks)
        self.assertEqual(files(self.folder / "r1"), files(self.folder / "r3"))
        done = pmpd("quantize", TINY, self.folder / "r1", "--calib", self.calib, ranks=2, ok=False, timeout=60)
        self.assertNotEqual(done.returncode, 0)
        self.assertEqual(done.stderr.decode().count("pmpd: error: "), 1)
        self.assertIn("r1", done.stderr.decode())

    def test_resume(self):
        """Killed after some blocks and started again: the same model, and the kept blocks are gone."""
        args = ["quantize", TINY, self.folder / "killed", "--calib", self.calib, "--sweeps", 4, "--json"]
        pmpd("quantize", TINY, self.folder / "whole", "--calib", self.calib, "--sweeps", 4)
        kept = self.folder / "killed.tmp"
        process = subprocess.Popen(command(*args), env=environment(), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and not (kept / "block-00001").exists():
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        self.assertTrue((kept / "stamp").exists(), "the run ended before it could be killed")
        other = pmpd("quantize", TINY, self.folder / "killed", "--calib", self.calib, "--sweeps", 2, ok=False)
        self.assertIn("run with other options", other.stderr.decode())
        damaged = kept / "block-00000"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        report = result(*args[:-1])
        self.assertGreaterEqual(report["calibration"]["resumed_blocks"], 1)
        self.assertEqual(files(self.folder / "whole"), files(self.folder / "killed"))
        self.assertFalse(kept.exists())

    def test_families(self):
        """Calibrated on the ids that are scored, every family is nearer to its reference logits than
        without data, at every precision."""
        for folder in sorted((TOP / "tests" / "golden" / "families").iterdir()):
            ids, want = json.loads((folder / "ids.json").read_text()), np.load(folder / "logits.npy")
            calib = self.folder / "calib.json"
            calib.write_text(json.dumps({"ids": [ids]}))
            errors = []
            for name, args in (("plain", []), ("calibrated", ["--calib", calib])):
                out = self.folder / f"{folder.name}-{name}"
                pmpd("quantize", folder, out, "--group", 32, *args)
                errors.append([nmse(logits(out, ids, "--bits", b, "--kv", "f32"), want) for b in (2, 3, 4)])
            for plain, calibrated in zip(*errors):
                self.assertLess(calibrated, plain, folder.name)

    def test_refused(self):
        for args, part in [
            (["--method", "gptq", "--bits", "3"], "give --calib FILE"),
            (["--method", "gptq", "--calib", self.calib], "makes one precision"),
            (["--method", "rtn", "--calib", self.calib], "leave out --calib"),
            (["--method", "kmeans", "--tail", "8"], "takes none of --alphas, --tail"),
            (["--method", "awq"], "expected joint, rtn"),
            (["--sweeps", "2"], "which is missing"),
            (["--calib", self.calib, "--damp", "0"], "--damp is \"0\""),
            (["--calib", self.folder / "none.txt"], "none.txt"),
            (["--calib", self.calib, "--window", "4096"], "larger than the context"),
        ]:
            done = pmpd("quantize", TINY, self.folder / "out", *args, ok=False)
            self.assertNotEqual(done.returncode, 0, args)
            self.assertIn(part, done.stderr.decode(), args)
            self.assertFalse((self.folder / "out").exists())


if __name__ == "__main__":
    main()

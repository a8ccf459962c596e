"""pmpd dataset, train and export: rows against runs of their own, ROUGE-L and the network written again in
Python; the same on any number of ranks and after a kill; what is refused."""
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import h5py
import numpy as np
from common import TINY, TOP, Case, command, environment, main, pmpd, result, write_config

T, N = 42, 10
AT = [0, 14, 28]


def rouge_l(a, b):
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (a, b))
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b):
            new.append(row[j] + 1 if x == y else max(row[j + 1], new[j]))
        row = new
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


def contents(path):
    """Everything but the provenance."""
    with h5py.File(path) as f:
        sets = ("rows", "candidates", "scores", "class_at", "kv_features/values", "kv_features/offset", "signals/values")
        return dict(f.attrs), {name: f[name][()] for name in sets}


def network(c, features):
    """The classifier's definition on K and V (2, tokens, dimension)."""
    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    k, v = features.astype(np.float64)
    query = c["query"][()].astype(np.float64)
    x = (softmax(query @ k.T / np.sqrt(k.shape[1])) @ v).mean(1).ravel()
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * c["norm_gain"][()] + c["norm_bias"][()]
    h = np.maximum(c["w1"][()].astype(np.float64) @ x + c["b1"][()], 0)
    return softmax(c["w2"][()] @ h + c["b2"][()])


class Learn(Case):
    @classmethod
    def setUpClass(cls):
        cls.shared = pathlib.Path(tempfile.mkdtemp(prefix="pmpd-e2e-"))
        cls.addClassCleanup(shutil.rmtree, cls.shared, ignore_errors=True)
        nested, cls.config, prompts = cls.shared / "nested", cls.shared / "learn.cfg", cls.shared / "prompts.jsonl"
        pmpd("quantize", TINY, nested, "--bits", "2,4")
        subprocess.run([sys.executable, TOP / "experiments/learn/write_prompts.py", str(N), prompts], check=True)
        write_config(cls.config, model__path=nested, prompts__path=prompts, decode__slots=4, decode__max_new_tokens=T,
                     backend__threads=1)

    def arguments(self, out, *more):
        return ("dataset", self.config, "--out", self.folder / out, "--high", 4, "--low", 2, "--reference", TINY, *more)

    def dataset(self, out, *more, ranks=0, ok=True):
        return pmpd(*self.arguments(out, *more), ranks=ranks, ok=ok)

    def refused(self, says, *args, ranks=0):
        done = pmpd(*args, ok=False, ranks=ranks)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn(says, done.stderr.decode())

    def same(self, a, b):
        (attrs_a, a), (attrs_b, b) = contents(a), contents(b)
        self.assertEqual(attrs_a, attrs_b)
        for name in a:
            self.assertTrue(np.array_equal(a[name], b[name]), name)

    def check_rows(self, path):
        _, d = contents(path)
        texts = d["candidates"]["text"].reshape(N, len(AT))
        for i, row in enumerate(d["rows"]):
            reference = row["reference"].decode()
            high = rouge_l(row["high"].decode(), reference)
            scores = [rouge_l(text.decode(), reference) for text in texts[i]]
            np.testing.assert_allclose(d["scores"][i], scores, atol=1e-6)
            self.assertAlmostEqual(row["high_score"], high, places=6)
            good = [j for j, s in enumerate(scores) if round(1000 * s) >= round(1000 * high)]
            self.assertEqual(row["label"], good[0] if good else len(AT))
        self.assertGreater(len(set(d["rows"]["label"])), 1)
        return d, texts

    def check_against_runs(self, d, texts):
        """The high level's text, and the second candidate's, as pmpd run decodes them."""
        for name, plan, expected in (("high", "0:4", d["rows"]["high"]), ("switch", f"0:4 {AT[1]}:2", texts[:, 1])):
            out = self.folder / name
            pmpd("run", self.config, "--set", f"output.dir={out}", "--set", "output.kv_features=true",
                 "--set", "policy.name=static", "--set", "policy.prefill=4", "--set", f"policy.switches={plan}")
            answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
            for i, answer in enumerate(answers):
                self.assertEqual(answer["choices"][0]["turns"][0], expected[i].decode(), f"{name} {i}")
        with h5py.File(self.folder / "high" / "run.h5") as run:
            self.assertTrue(np.array_equal(run["kv_features/values"][()], d["kv_features/values"]))
            self.assertTrue(np.array_equal(run["prompts"]["logprob0"], d["signals/values"][self.first(d), 0]))

    @staticmethod
    def first(d):
        return np.concatenate([[0], np.cumsum(d["rows"]["n_new"])[:-1]])

    def kill_and_resume(self):
        journal = self.folder / "killed.h5.parts" / "replica-0000" / "journal.bin"
        running = subprocess.Popen(command(*self.arguments("killed.h5")), env=environment(), stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)
        while running.poll() is None and (not journal.exists() or journal.stat().st_size < 20000):  # past stage 1
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        self.assertEqual(running.wait(), -signal.SIGKILL)
        self.assertFalse((self.folder / "killed.h5").exists())
        done = self.dataset("killed.h5", ranks=3)
        self.assertRegex(done.stderr.decode(), r"[1-9][0-9]* of 10 rows are done already")

    def test_dataset(self):
        self.dataset("a.h5", ranks=2)
        d, texts = self.check_rows(self.folder / "a.h5")
        self.check_against_runs(d, texts)
        self.kill_and_resume()
        self.same(self.folder / "a.h5", self.folder / "killed.h5")
        # the low level being the high one, nothing is lost by any criterion, and divergences agree
        for criterion in ("kl", "agreement"):
            pmpd("dataset", self.config, "--out", self.folder / f"{criterion}.h5", "--high", 4, "--low", 4, "--reference",
                 TINY, "--criterion", criterion, "--tolerance", 0, "--set", "prompts.limit=2")
            attrs, same = contents(self.folder / f"{criterion}.h5")
            self.assertEqual(attrs["criterion"], criterion)
            self.assertTrue((same["rows"]["label"] == 0).all())
            self.assertTrue((same["scores"] == same["rows"]["high_score"][:, None]).all())
            worst, best = (-1, 0) if criterion == "kl" else (0, 1)
            self.assertTrue(((same["scores"] >= worst) & (same["scores"] <= best)).all())
        # every head: their mean is what the mean has, up to rounding
        self.dataset("heads.h5", "--heads", "all", "--set", "prompts.limit=2")
        heads = contents(self.folder / "heads.h5")[1]["kv_features/values"]
        mean = d["kv_features/values"][:len(heads)]
        np.testing.assert_allclose(heads.reshape(len(heads), 2, -1, mean.shape[2]).mean(2), mean, atol=1e-5)
        # prefixes: one split per prompt, however often it is cut
        self.dataset("cut.h5", "--prefixes", 3, "--set", "prompts.limit=4", "--set", "decode.max_new_tokens=6")
        rows = contents(self.folder / "cut.h5")[1]["rows"]
        self.assertEqual([(r["ordinal"], r["prefix"]) for r in rows], [(i, j) for i in range(4) for j in (1, 2, 3)])
        self.assertEqual({len({r["split"] for r in rows if r["ordinal"] == i}) for i in range(4)}, {1})
        self.assertGreater(len({r["n_tok"] for r in rows}), 6)
        self.assertTrue((rows["n_tok"] >= 32).all())

    def make_data(self):
        """A dataset of one prompt in many prefixes and few tokens: small, with all splits."""
        self.dataset("data.h5", "--prefixes", 6, "--candidates", "0 1/2", "--set", "decode.max_new_tokens=10",
                     "--set", "decode.slots=8")
        return self.folder / "data.h5"

    def test_train(self):
        data, out = self.make_data(), self.folder / "c.h5"
        args = ("train", data, "--out", out, "--epochs", 6, "--allow-empty", "--test")
        got = result(*args)
        with h5py.File(out) as c, h5py.File(data) as d:
            self.assertEqual(c.attrs["model_digest"], d.attrs["model_digest"])
            self.assertEqual((c.attrs["high"], c.attrs["low"], list(c["class_at"])), ("4", "2", [0, 0.5, 1]))
            offset, values, rows = d["kv_features/offset"][()], d["kv_features/values"][()], d["rows"][()]
            for split, number in (("validation", 1), ("test", 2)):
                mine = [i for i in range(len(rows)) if rows["split"][i] == number]
                p = np.array([network(c, values[offset[i]:offset[i + 1]].swapaxes(0, 1)) for i in mine])
                labels = rows["label"][mine]
                self.assertEqual(got[split]["n"], len(mine))
                self.assertAlmostEqual(got[split]["accuracy"], (p.argmax(1) == labels).mean(), places=6)
                self.assertAlmostEqual(got[split]["nll"], -np.log(p[np.arange(len(mine)), labels]).mean(), places=4)
            first = {name: c[name][()] for name in ("query", "norm_gain", "w1", "w2", "b2")}
        self.assertEqual(got["n_train"], int((rows["split"] == 0).sum()))
        self.assertEqual(result(*args, ranks=3), got)
        with h5py.File(out) as c:
            for name, value in first.items():
                self.assertTrue(np.array_equal(value, c[name][()]), name)
        shown = result("inspect", out)
        self.assertEqual((shown["kind"], shown["class_at"], json.loads(shown["training"])["seed"]),
                         ("classifier (kv)", [0, 0.5, 1], 1))
        shown = result("inspect", data)
        self.assertEqual([sum(shown["labels"][name]) for name in ("train", "validation", "test")],
                         [int((rows["split"] == s).sum()) for s in range(3)])
        self.check_import(args, got, out)
        step = result("train", data, "--out", self.folder / "s.h5", "--kind", "step", "--epochs", 3, "--allow-empty")
        self.assertEqual(step["kind"], "step")
        # a search, again from its journal, on other ranks
        search = ("train", data, "--out", self.folder / "t.h5", "--trials", 7, "--epochs", 3, "--allow-empty")
        one = result(*search, ranks=2)
        again = pmpd(*search, "--json")
        self.assertEqual(json.loads(again.stdout), one)
        self.assertIn("9 trainings are done already", again.stderr.decode())  # 7 and the best 2
        with h5py.File(self.folder / "t.h5.trials" / "trials.h5") as f:
            trials = f["trials"][()]
        self.assertEqual(list(trials["rung"]), 7 * [0] + 2 * [1])
        self.assertAlmostEqual(one["learning_rate"], trials["learning_rate"][7], places=8)
        self.assertEqual(sorted(trials["loss"][:7]), list(trials["loss"][:7]))
        self.check_export(data)

    def check_import(self, args, got, out):
        """A classifier written by the script, from which training starts (and learns nothing)."""
        sys.path.insert(0, str(TOP / "experiments" / "learn"))
        from write_classifier import write
        with h5py.File(out) as c:
            parts = [c[name][()] for name in ("query", "norm_gain", "norm_bias", "w1", "b1", "w2", "b2", "class_at")]
            write(self.folder / "w.h5", *parts, high=c.attrs["high"], low=c.attrs["low"])
        still = ("--epochs", 1, "--lr", 1e-9, "--weight-decay", 0, "--from", self.folder / "w.h5", "--allow-empty")
        again = result(*args[:2], "--out", self.folder / "v.h5", *still)
        self.assertEqual(again["validation"]["confusion"], got["validation"]["confusion"])
        self.assertAlmostEqual(again["validation"]["nll"], got["validation"]["nll"], places=5)

    def check_export(self, data):
        half = ["--prefixes", 6, "--candidates", "0 1/2", "--set", "decode.max_new_tokens=10"]
        part, other, merged = (self.folder / name for name in ("part.h5", "other.h5", "merged.h5"))
        self.dataset("part.h5", *half, "--set", "prompts.limit=3")
        self.assertIn("18 rows were there already", pmpd("export", data, part, merged).stderr.decode())
        self.same(data, merged)
        self.refused("is there already", "export", data, part)
        self.dataset("other.h5", *half[:-1], "decode.max_new_tokens=8", "--set", "prompts.limit=1")
        self.refused("other.h5 was made with another tolerance, max_new_tokens (8, before it 10)", "export", data, other,
                     self.folder / "no.h5")

    def test_refused(self):
        out = self.folder / "no.h5"
        for says, args in (("--high B and --low B", ("dataset", self.config, "--out", out)),
                           ("unknown criterion \"bleu\"", self.arguments("no.h5", "--criterion", "bleu")),
                           ("kl needs --tolerance", self.arguments("no.h5", "--criterion", "kl")),
                           ("ascending fractions", self.arguments("no.h5", "--candidates", "1/2 1/3")),
                           ("they hold 2, 4", self.arguments("no.h5", "--set", "prompts.limit=1", "--high", "3")),
                           ("set it to 0", self.arguments("no.h5", "--set", "decode.temperature=1")),
                           ("train needs DATASET.h5", ("train", "--out", out)),
                           ("found \"kw\"", ("train", "x.h5", "--out", out, "--kind", "kw")),
                           ("dropout 2; expected", ("train", "x.h5", "--out", out, "--dropout", "2")),
                           ("x.h5", ("train", "x.h5", "--out", out)),
                           ("x.h5", ("export", "x.h5", out))):
            self.refused(says, *args)


if __name__ == "__main__":
    main()

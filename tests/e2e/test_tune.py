"""pmpd tune high: the lowest precision that loses nothing, from perplexities that pmpd perplexity
prints too. pmpd tune plan: scores and intervals done again here, from pmpd run; the same result on other
ranks and after a kill."""
import json
import pathlib
import re
import shutil
import subprocess
import tempfile

import h5py
import numpy as np

from common import BUILD, PMPD, TINY, TOP, Case, command, environment, main, pmpd, result, write_config


class Tune(Case):
    def setUp(self):
        super().setUp()
        rows = json.loads((TOP / "experiments" / "tasks" / "tiny_test_ids.json").read_text())["ids"][:12]
        self.text = self.folder / "rows.json"
        self.text.write_text(json.dumps({"ids": rows}))
        self.nested = self.folder / "nested"
        pmpd("quantize", TINY, self.nested)

    def test_high(self):
        def perplexity(model, *args):
            return result("perplexity", model, self.text, *args)["perplexity"]

        reference = perplexity(TINY)
        each = {b: perplexity(self.nested, "--bits", b) for b in (2, 3, 4)}
        for ranks in (0, 2):
            for loss in ("0.2%", "1%", "0.1", "500%"):
                share = float(loss[:-1]) / 100 if loss.endswith("%") else float(loss)
                good = [b for b in (2, 3, 4) if all(each[c] <= reference * (1 + share) for c in (2, 3, 4) if c >= b)]
                got = result("tune", "high", self.nested, "--text", self.text, "--loss", loss, "--reference", TINY,
                             ranks=ranks)
                self.assertEqual(got["high"], min(good) if good else None, loss)
                self.assertEqual(got["low"], min(good) - 1 if good and min(good) > 2 else None, loss)
                for row in got["precisions"]:
                    # two ranks add up in another order, and 8-bit activations make more of it
                    self.assertLess(abs(row["perplexity"] / each[row["bits"]] - 1), 2e-3 if ranks else 1e-6)

    def test_without_reference(self):
        got = result("tune", "high", self.nested, "--text", self.text, "--loss", "0")
        self.assertEqual(got["reference_perplexity"], got["precisions"][-1]["perplexity"])

    def test_refused(self):
        for args, says in ((("high", TINY, "--text", self.text), "not nested"),
                           (("low", TINY, "--text", self.text), "found \"low\""),
                           (("high", self.nested), "needs --text"),
                           (("high", self.nested, "--text", self.text, "--loss", "much"), "found \"much\"")):
            done = pmpd("tune", *args, ok=False)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn(says, done.stderr.decode())

    def test_plan_is_known(self):
        self.assertIn("--grid", pmpd("tune", "plan", "--help").stdout.decode())


def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(text, reference):
    """F1 of the longest common subsequence of (ASCII) words."""
    a, b = words(text), words(reference)
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b):
            row[j + 1] = before[j] + 1 if x == y else max(row[j], before[j + 1])
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


class Plan(Case):
    T = 30
    N = 24  # validation prompts: two rungs, of 8 and of 24

    @classmethod
    def setUpClass(cls):
        cls.shared = pathlib.Path(tempfile.mkdtemp(prefix="pmpd-e2e-"))
        pmpd("quantize", TINY, cls.shared / "nested")
        lines = (TOP / "experiments" / "tasks" / "tiny_translation.jsonl").read_text().splitlines()
        split = {name: [v for v in lines if json.loads(v)["split"] == name] for name in ("validation", "test")}
        cls.prompts = cls.shared / "prompts.jsonl"
        cls.prompts.write_text("\n".join(split["test"][:6] + split["validation"][:cls.N]) + "\n")
        cls.config = cls.shared / "tune.cfg"
        write_config(cls.config, model__path=cls.shared / "nested", prompts__path=cls.prompts, decode__slots=8,
                     decode__max_new_tokens=cls.T, backend__threads=1)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.shared, ignore_errors=True)

    def tune(self, name, *args, **kwargs):
        return pmpd("tune", "plan", self.config, "--out", self.folder / name, "--loss", "2%", *args, **kwargs)

    def faulty(self, name, fault, ranks):
        """The program with a fault; it must end by itself."""
        args = command("tune", "plan", self.config, "--out", self.folder / name, "--loss", "2%", ranks=ranks)
        args[args.index(PMPD)] = str(BUILD / "tests" / "pmpd_faulty")
        env = dict(environment(), PMPD_FAULT=fault, TMPDIR=str(self.folder))
        return subprocess.run(args, env=env, timeout=60, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)

    def read(self, name):
        with h5py.File(self.folder / name / "tune.h5") as f:
            return ({k: f[k][()] for k in ("trials", "scores", "best", "loss", "n_validation")},
                    {k: v[()] for k, v in f["test"].items()})

    def check_scores(self, got, config, i, *sets):
        """A trial's answers again, by pmpd run, scored here."""
        mine = {(s["split"].decode(), s["id"].decode()): s for s in got["scores"] if s["trial"] == i}
        out = self.folder / f"run-{i}"
        pmpd("run", config, "--set", f"output.dir={out}", *sets)
        lines = [json.loads(v) for v in self.prompts.read_text().splitlines()]
        answers = [json.loads(v) for v in (out / "answers.jsonl").read_text().splitlines()]
        with h5py.File(out / "run.h5") as run:
            steps = run["steps"][:]
        self.assertEqual(len(np.unique(steps["level"])), len(got["trials"][i]["switches"].split()))
        for k, (line, answer) in enumerate(zip(lines, answers)):
            self.assertEqual(line["id"], answer["question_id"])
            s = mine.pop((line["split"], line["id"]), None)
            if s is None:  # not every trial meets every prompt
                continue
            self.assertAlmostEqual(s["quality"], rouge_l(answer["choices"][0]["turns"][0], line["reference"]), 9)
            own = steps[steps["prompt"] == k]
            self.assertEqual(s["n_steps"], len(own))
            self.assertAlmostEqual(s["decode_bits"], own["avg_bits"].mean(), 5)
        self.assertFalse(mine)

    def check_trials(self, got):
        """Costs, intervals and verdicts from the scores."""
        trials, loss = got["trials"], got["loss"]
        scores = [{s["id"]: s for s in got["scores"] if s["trial"] == i and s["split"] == b"validation"}
                  for i in range(len(trials))]
        reference = next(i for i, t in enumerate(trials) if t["verdict"] == b"reference")
        self.assertEqual((trials[reference]["plan"], len(scores[reference])), (b"prefill:4 0:4", self.N))
        random = np.random.default_rng(1)
        for i, t in enumerate(trials):
            points = [tuple(map(int, p.split(":"))) for p in t["switches"].decode().split()]
            level = [max(p for p in points if p[0] <= step)[1] for step in range(self.T)]
            bits = [b for s in scores[reference].values() for b in level[:s["n_steps"]]]
            self.assertAlmostEqual(t["bits"], np.mean(bits), 9)
            self.assertEqual(t["n_prompts"], len(scores[i]))
            if not len(scores[i]):
                self.assertEqual(t["verdict"], b"undecided")
                continue
            d = np.array([s["quality"] - scores[reference][k]["quality"] for k, s in scores[i].items()])
            means = d[random.integers(0, len(d), (10000, len(d)))].mean(axis=1)
            self.assertAlmostEqual(t["difference"], d.mean(), 9)
            for end, p in ((t["low"], 0.025), (t["high"], 0.975)):
                # few prompts: means have jumps, so shares are compared; two samples of 10000, four deviations
                error = 4 * (2 * p * (1 - p) / 10000) ** 0.5
                self.assertLess((means < end - 1e-12).mean(), p + error)
                self.assertGreater((means <= end + 1e-12).mean(), p - error)
            if t["verdict"] == b"worse":
                self.assertLess(t["high"], -loss)
            elif t["verdict"] != b"reference":
                self.assertEqual(t["verdict"], b"undecided" if t["n_prompts"] < self.N
                                 else b"lossless" if t["low"] >= -loss else b"unproven")
            if i < got["best"]:
                self.assertIn(t["verdict"], (b"worse", b"unproven"))
        self.assertEqual(trials[got["best"]]["verdict"], b"lossless")
        self.assertTrue((np.diff(trials["bits"]) >= -1e-12).all())
        self.assertEqual(len(trials), 30)
        self.assertGreater(sum(t["verdict"] == b"worse" and t["n_prompts"] == 8 for t in trials), 0)

    def test_same_result(self):
        self.tune("one")
        got, test = self.read("one")
        self.check_trials(got)
        self.check_scores(got, self.folder / "one" / "best.cfg", got["best"])
        for i in (1, 2):  # the same schedule after another prefill; beside others in the first rung
            self.check_scores(got, self.config, i, "--set", "policy.name=static", "--set",
                              f"policy.prefill={got['trials'][i]['prefill'].decode()}", "--set",
                              f"policy.switches={got['trials'][i]['switches'].decode()}")
        mine = {i: [s["quality"] for s in got["scores"] if s["trial"] == i and s["split"] == b"test"]
                for i in (got["best"], next(i for i, t in enumerate(got["trials"]) if t["verdict"] == b"reference"))}
        self.assertEqual(test["n_prompts"], 6)
        self.assertAlmostEqual(test["quality"], np.mean(mine[got["best"]]), 9)
        self.assertAlmostEqual(test["difference"], np.mean(list(mine.values())[0]) - np.mean(list(mine.values())[1]), 9)

        self.assertNotEqual(self.faulty("killed", "decode:45:kill", 2).returncode, 0)
        self.assertFalse((self.folder / "killed" / "tune.h5").exists())
        journals = list((self.folder / "killed" / "trials").glob("replica-*/journal.bin"))
        self.assertEqual(len(journals), 2)
        with open(journals[0], "ab") as f:
            f.write(b"PMJ1 and a torn record")
        said = self.tune("killed", ranks=2).stderr.decode()
        kept = int(re.search(r"has (\d+) answers already", said).group(1))
        self.assertGreater(kept, 0)
        self.assertEqual(int(re.search(r"(\d+) answers decoded", said).group(1)) + kept, len(got["scores"]))
        again, test_again = self.read("killed")
        for k, v in got.items():
            self.assertEqual(repr(again[k].tolist()), repr(v.tolist()), k)  # NaN where nothing was measured
        self.assertEqual(test_again, test)
        self.assertEqual(*[(self.folder / n / "best.cfg").read_text() for n in ("one", "killed")])
        self.assertIn("pmpd: 0 answers decoded", self.tune("killed").stderr.decode())

    def test_references(self):
        """The highest level's own texts, and a model's, as the aim."""
        few = ("--set", "prompts.limit=3", "--levels", "4 2", "--grid", "1")
        self.tune("high", "--reference", "high", *few)
        got, _ = self.read("high")
        self.assertEqual([t["quality"] for t in got["trials"] if t["verdict"] == b"reference"], [1.0])
        self.assertEqual(len(got["trials"]), 4)
        said = self.tune("dense", "--reference", TINY, *few, ranks=2).stdout.decode()
        self.assertIn(f"against {TINY}", said)
        got, _ = self.read("dense")
        some = ("--set", "prompts.split=validation", "--set", "prompts.limit=3")
        texts = []
        for model, level in ((self.shared / "nested", 4), (TINY, "max")):
            out = self.folder / f"run-{level}"
            pmpd("run", self.config, *some, "--set", f"model.path={model}", "--set", "policy.name=fixed",
                 "--set", f"policy.level={level}", "--set", f"policy.prefill={level}", "--set", f"output.dir={out}")
            answers = map(json.loads, (out / "answers.jsonl").read_text().splitlines())
            texts.append({a["question_id"]: a["choices"][0]["turns"][0] for a in answers})
        reference = next(i for i, t in enumerate(got["trials"]) if t["verdict"] == b"reference")
        for s in got["scores"]:
            if s["trial"] == reference and s["split"] == b"validation":
                k = s["id"].decode()
                self.assertAlmostEqual(s["quality"], rouge_l(texts[0][k], texts[1][k]), 9)

    def test_poison(self):
        done = self.faulty("nan", "decode:9:nan", 2)
        self.assertNotEqual(done.returncode, 0)
        self.assertRegex(done.stderr.decode(), r"prompt translation-validation-\d+ under \"prefill:4 0:4\"")

    def test_refused(self):
        lines = [json.loads(v) for v in self.prompts.read_text().splitlines()]
        plain, test = self.folder / "plain.jsonl", self.folder / "test.jsonl"
        plain.write_text("\n".join(json.dumps({k: v for k, v in p.items() if k != "split"}) for p in lines))
        test.write_text("\n".join(json.dumps(dict(p, split="test", reference="")) for p in lines))
        bare = self.folder / "bare.jsonl"
        bare.write_text("\n".join(json.dumps(dict(p, reference="")) for p in lines))
        foreign = self.folder / "foreign" / "trials" / "replica-0000"
        foreign.mkdir(parents=True)
        (foreign / "journal.bin").write_bytes(b"something else altogether")
        for name, args, says in (("a", ("--set", f"prompts.path={plain}"), "no prompt names its split"),
                                 ("a", ("--set", f"prompts.path={test}"), "no prompt of split \"validation\""),
                                 ("a", ("--set", f"prompts.path={bare}", "--reference", "answers"),
                                  "use --reference high"),
                                 ("a", ("--levels", "4"), "there is one level"),
                                 ("a", ("--levels", "2 4"), "not less than the 2 of 2"),
                                 ("a", ("--set", f"model.path={TINY}"), "not nested"),
                                 ("a", ("--set", "decode.temperature=1"), "greedy"),
                                 ("a", ("--loss", "much"), "found \"much\""),
                                 ("foreign", (), "journal.bin")):
            done = self.tune(name, *args, ok=False)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn(says, done.stderr.decode())


if __name__ == "__main__":
    main()

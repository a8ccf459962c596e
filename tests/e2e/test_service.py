"""The scheduler service in whole runs: the same tokens, decisions and dials for every placement of the service and
number of replicas, with a budget and without, after kills too; what ends a run says so and can be resumed."""
import json
import pathlib
import shutil
import tempfile

import h5py

from common import TINY, main, pmpd, read_run, result
from faults import DONE, ERROR, USER_ERROR, FaultCase, records_of, start
from test_policies import write_classifier

LAG = 3
WINDOW = 3
BUDGET = {"budget__average_bits": 2.8, "budget__window": WINDOW}


class Service(FaultCase):
    n_prompts = 8
    shared = None  # folder of the nested model

    @classmethod
    def setUpClass(cls):
        cls.shared = pathlib.Path(tempfile.mkdtemp(prefix="pmpd-e2e-"))
        pmpd("quantize", TINY, cls.shared / "nested", "--bits", "2,3,4")

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.shared, ignore_errors=True)

    def settings(self, **more):
        """A policy with a memory and a dial, over three levels."""
        return {"model__path": self.shared / "nested", "policy__name": "confidence", "policy__levels": "4 3 2",
                "policy__prefill": "4", "policy__window": 2, "service__lag": LAG, "decode__slots": 2,
                "decode__max_new_tokens": 16, "parallel__timeout_s": 60.0, **more}

    def run_one(self, name, ranks=0, own=False, fault=None, code=DONE, **more):
        config = self.config(name, **self.settings(service__rank="own" if own else "inline", **more))
        run = start(config, ranks=ranks, fault=fault)
        self.assertEqual(run.code, code, run.err)
        return run

    def told(self, name):
        """What must not depend on who decided and when."""
        runs = read_run(self.folder / name)
        with h5py.File(self.folder / name / "run.h5") as f:
            decisions = f["decisions"][:]
            prefill = {(int(p["prompt"]), int(p["turn"])): int(p["prefill_level"]) for p in f["prompts"][:]}
        kept = [c for c in decisions.dtype.names if c != "latency_us"]
        return ({k: (v["tokens"], v["levels"], v["logprob"].tobytes()) for k, v in runs.items()},
                decisions[kept].tolist(), prefill)

    def states(self, name):
        return [(s["lease"], s["ordinal"], s["dial"], s["account"]) for s in records_of(self.folder / name, "state")]

    def test_placements(self):
        worlds = (2, True), (3, False), (4, True)  # 1, 3 and 3 replicas
        for what, budget, others in (("free", {}, worlds[1:]), ("budget", BUDGET, worlds + ((2, False),))):
            self.run_one(f"{what}-0", **budget)
            whole = self.told(f"{what}-0")
            for i, (ranks, own) in enumerate(others, 1):
                with self.subTest(budget=what, ranks=ranks, own=own):
                    self.run_one(f"{what}-{i}", ranks=ranks, own=own, **budget)
                    self.assertEqual(self.told(f"{what}-{i}"), whole)
                    self.assertEqual(self.states(f"{what}-{i}"), self.states(f"{what}-0"))
        self.check_decisions("budget-0")
        self.check_decisions("free-0")
        dials = [s[2] for s in self.states("budget-0")]
        self.assertEqual(len(dials), self.n_prompts)
        self.assertGreater(len(set(dials[WINDOW:])), 1)  # the controller moves it
        self.assertEqual(self.states("free-0"), [])
        self.check_budget("budget-0")
        said = pmpd("inspect", self.folder / "budget-0").stdout.decode()
        self.assertRegex(said, r"(?s)rows.*decisions +\d+.*budget +8\n")
        said = result("inspect", self.folder / "budget-0")
        self.assertEqual(said["rows"]["budget"], self.n_prompts)

    def test_classifiers(self):
        """Requests that travel: a classifier at the service looks at K and V that a replica sends."""
        config = json.loads((TINY / "config.json").read_text())
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        digest = result("inspect", self.shared / "nested")["digest"]
        files = [self.folder / f"{pair}.h5" for pair in ("4-3", "3-2")]
        for i, file in enumerate(files):
            write_classifier(file, head_dim, digest, file.stem[0], file.stem[2], seed=i + 5)
        learned = {"policy__name": "learned", "policy__classifier": ":".join(map(str, files)), "service__lag": 2, **BUDGET}
        self.run_one("learned-0", **learned)
        whole = self.told("learned-0")
        self.assertGreater(len({level for _, levels, _ in whole[0].values() for level in levels}), 1)
        for i, (ranks, own) in enumerate(((3, False), (4, True)), 1):
            with self.subTest(ranks=ranks, own=own):
                self.run_one(f"learned-{i}", ranks=ranks, own=own, **learned)
                self.assertEqual(self.told(f"learned-{i}"), whole)
                self.assertEqual(self.states(f"learned-{i}"), self.states("learned-0"))
        # the service dies while others wait for it
        config = self.config("killed", **self.settings(service__rank="own", **learned))
        run = start(config, ranks=3, fault="journal_sync:6:kill@rank=0")
        self.assertNotEqual(run.code, DONE)
        self.check_gone(config)
        self.run_one("killed", ranks=2, own=True, **learned)
        self.assertEqual(self.told("killed"), whole)

    def check_decisions(self, name):
        """/decisions alone says at which level every step ran: the prefill level, then what took effect."""
        with h5py.File(self.folder / name / "run.h5") as f:
            table = f["decisions"]
            self.assertIn("description", table.attrs)
            units = dict(line.split(": ") for line in table.attrs["unit"].splitlines())
            self.assertEqual(set(units), set(table.dtype.names))
            for column in table.dtype.names:
                self.assertTrue(table.attrs[column])
            decisions, steps = table[:], f["steps"][:]
            prefill = {int(p["prompt"]): int(p["prefill_level"]) for p in f["prompts"][:]}
        self.assertGreater(int((decisions["asked"] >= 0).sum()), 0)  # plans were amended
        self.assertTrue((decisions["latency_us"] >= 0).all())
        for prompt, level in prefill.items():
            mine = steps[steps["prompt"] == prompt]
            levels = {int(s["step"]): int(s["level"]) for s in mine}
            told = dict.fromkeys(levels, level)
            for d in decisions[decisions["prompt"] == prompt]:
                self.assertEqual(int(d["step"]), max(int(d["asked"]) + LAG, int(d["step"]) if d["asked"] < 0 else 0))
                self.assertGreaterEqual(int(d["step"]), LAG - 1)
                told.update((s, int(d["level"])) for s in told if s >= d["step"])
            self.assertEqual(told, levels, f"prompt {prompt}")

    def check_budget(self, name):
        """/budget is the journal's states; dials of decisions are those of the leases."""
        with h5py.File(self.folder / name / "run.h5") as f:
            rows, decisions = f["budget"][:], f["decisions"][:]
            self.assertIn("description", f["budget"].attrs)
        self.assertEqual([(int(r["lease"]), int(r["prompt"]), float(r["dial"]), float(r["account"])) for r in rows],
                         self.states(name))
        dial = {int(r["prompt"]): r["dial"] for r in rows}
        for d in decisions:
            self.assertEqual(d["dial"], dial[int(d["prompt"])])

    def test_killed_and_resumed(self):
        """A replica, then the service's rank; the dials go on as if nothing had been."""
        self.run_one("whole", **BUDGET)
        config = self.config("killed", **self.settings(service__rank="own", **BUDGET))
        run = start(config, ranks=3, fault="decode:5:kill@rank=2")
        self.assertNotEqual(run.code, DONE)
        self.check_gone(config)
        # two leases are two records each; the third's come after a finished prompt
        run = start(config, ranks=2, fault="journal_write:8:kill@rank=0")
        self.assertEqual([f[:2] for f in run.faults], [[0, "journal_write"]])
        self.assertNotEqual(run.code, DONE)
        self.check_gone(config)
        self.assertGreater(len(records_of(self.folder / "killed", "finished")), 0)
        self.assertFalse((self.folder / "killed" / "run.h5").exists())
        config = self.config("killed", **self.settings(**BUDGET))
        run = start(config, ranks=2)
        self.assertEqual(run.code, DONE, run.err)
        self.assertEqual(self.told("killed"), self.told("whole"))
        self.assertEqual(sorted(set(self.states("killed"))), self.states("whole"))

    def test_silent_replica(self):
        """One that hangs by itself, in no collective."""
        config = self.config("silent", **self.settings(parallel__timeout_s=2.0, service__rank="own"))
        run = start(config, ranks=3, fault="decode:1:stop@rank=2")
        self.assertNotEqual(run.code, DONE)
        self.assertRegex(run.err, r"replica 1 \(rank 2\) has not answered for \d+ s.*parallel\.timeout_s")
        self.check_gone(config)

    def test_milliseconds(self):
        """The costs are measured once; a resumed run uses them."""
        budget = {"policy__name": "random", "budget__ms_per_token": 0.0, "budget__window": 2}
        probe = {**budget, "budget__ms_per_token": 1e6}  # out of reach: the message tells what is in reach
        run = self.run_one("probe", code=USER_ERROR, **probe)
        self.assertRegex(run.err, r"costs [0-9.e-]+ to [0-9.e-]+ ms; set a target between")
        self.assertFalse((self.folder / "probe" / "costs.txt").exists())
        # as if measured by an earlier start: a bit costs a millisecond, whatever this machine does
        folder = self.folder / "ms"
        folder.mkdir()
        (folder / "costs.txt").write_text("4.0 4\n3.0 3\n2.0 2\n")
        budget["budget__ms_per_token"] = 2.8
        self.run_one("ms", **budget)
        bits = {"policy__name": "random", "budget__average_bits": 2.8, "budget__window": 2}
        self.run_one("bits", **bits)
        # the embedded model's levels have 2, 3 and 4 bits on average: the same controller, the same tokens
        self.assertEqual(self.told("ms"), self.told("bits"))
        (folder / "costs.txt").write_text("4.0 4\n3.0 3\nfast 2\n")
        run = self.run_one("ms", code=ERROR, **budget)
        self.assertRegex(run.err, r"costs\.txt:3: expected milliseconds and a level, found \"fast 2\"")
        (folder / "costs.txt").write_text("4.0 4\n")
        run = self.run_one("ms", code=ERROR, **budget)
        self.assertRegex(run.err, r"has no cost of level 3")

    def test_refusals(self):
        for more, message in (
                ({"budget__average_bits": 5.0}, r"a budget of 5 bits cannot be held.*costs 2 to 4 bits"),
                ({"budget__average_bits": 3.0, "budget__ms_per_token": 1.0}, "one of them is the budget"),
                ({"budget__average_bits": 3.0, "policy__name": "fixed", "policy__level": "3", "policy__prefill": "3"},
                 "cannot be held"),
                ({"service__rank": "own"}, r"service\.rank = own: use 2 ranks \(1 for the service\)")):
            with self.subTest(**more):
                config = self.config("refused", **self.settings(**more))
                run = start(config)
                self.assertIn(run.code, (ERROR, USER_ERROR))
                self.assertRegex(run.err, message)
        config = self.config("refused", **self.settings(service__rank="own", parallel__tensor_ranks=2))
        run = start(config, ranks=4)
        self.assertRegex(run.err, r"mpirun -n 4 with parallel\.tensor_ranks = 2 and service\.rank = own: use 3 or 5")


if __name__ == "__main__":
    main()

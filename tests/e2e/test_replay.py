"""pmpd run --replay: a recorded run repeats bit for bit on other ranks; files that were changed are
reported or refused; what may differ is told from what must not."""
import json
import pathlib
import shutil
import tempfile

import h5py

from common import TINY, TOP, Case, main, pmpd, read_run, result, write_config

PROMPTS = TOP / "experiments" / "tasks" / "tiny_mixed.jsonl"
N = 6
NOT_EXPECTED = "a difference was not to be expected: program, arithmetic, sampling, model and prompts are"


class Replay(Case):
    @classmethod
    def setUpClass(cls):
        cls.top = pathlib.Path(tempfile.mkdtemp(prefix="pmpd-replay-"))
        cls.nested, cls.prompts = cls.top / "nested", cls.top / "prompts.jsonl"
        pmpd("quantize", TINY, cls.nested)
        rows = [json.loads(s) for s in PROMPTS.read_text().splitlines()[:N]]
        rows[1]["turns"].append(" What else?")
        rows[4]["turns"] += [" And then?", " Then?"]
        cls.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cls.record("run", ranks=2)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.top, ignore_errors=True)

    @classmethod
    def record(cls, name, ranks=0, **more):
        settings = {"model__path": cls.nested, "prompts__path": cls.prompts, "decode__slots": 3,
                    "decode__max_new_tokens": 24, "decode__temperature": 0.8, "decode__seed": 5,
                    "policy__name": "static", "policy__prefill": "4", "policy__switches": "0:4 6:3 14:2",
                    "output__dir": cls.top / name, "backend__threads": 1}
        settings.update(more)
        write_config(cls.top / f"{name}.cfg", **settings)
        return pmpd("run", cls.top / f"{name}.cfg", ranks=ranks)

    def copy(self, name="run"):
        """A run file to be changed, in a folder of its own."""
        folder = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
        return pathlib.Path(shutil.copy(self.top / name / "run.h5", folder))

    def replay(self, path, *args, code=0, ranks=0):
        done = pmpd("run", "--replay", path, "--json", *args, ranks=ranks, ok=False)
        error = done.stderr.decode()
        self.assertEqual(done.returncode, code, error)
        self.assertEqual(error.count("pmpd: error: "), 1 if code else 0, error)
        said = json.loads(done.stdout)
        self.assertEqual(said["verdict"] == "differs", code == 1)
        if code:
            self.assertIn(said["why"], error)
        return said

    def refused(self, path, *args, says):
        folder = path.parent
        before = sorted(folder.iterdir()) if folder.exists() else None
        done = pmpd("run", "--replay", path, *args, ok=False, timeout=60)
        error = done.stderr.decode(errors="replace")
        self.assertIn(done.returncode, (1, 2), error)
        self.assertEqual(error.count("pmpd: error: "), 1, error)
        for part in [says] if isinstance(says, str) else says:
            self.assertIn(part, error)
        self.assertEqual(done.stdout, b"")
        self.assertEqual(sorted(folder.iterdir()) if before is not None else None, before)

    def change(self, path, table, field, row, value):
        with h5py.File(path, "r+") as run:
            rows = run[table][:]
            rows[field][row] = value
            run[table][...] = rows

    def put(self, path, table, rows, **kwargs):
        """In place of a table, with its attributes."""
        with h5py.File(path, "r+") as run:
            attributes = dict(run[table].attrs)
            del run[table]
            run.create_dataset(table, data=rows, **kwargs).attrs.update(attributes)

    # ---- equal ----

    def test_equal_on_one_rank(self):
        path = self.copy()
        before, recorded = path.read_bytes(), read_run(path.parent)
        self.assertEqual(len(recorded), N + 3)
        n_tokens = sum(len(r["tokens"]) for r in recorded.values())
        said = self.replay(path)
        self.assertEqual(said["verdict"], "equal")
        self.assertIn("as it must be", said["why"])
        self.assertEqual(said["prompts"], N)
        for what in ("tokens", "levels", "logprobs", "entropies", "margins"):
            self.assertEqual(said["compared"][what]["compared"], n_tokens)
            self.assertEqual(said["compared"][what]["differ"], 0)
            self.assertIsNone(said["compared"][what]["first"])
        self.assertEqual(said["differs_between_runs"]["replicas"],
                         {"recorded": "2", "replay": "1", "matters_for": "cannot change tokens"})
        self.assertEqual(path.read_bytes(), before)
        # and by means of its own: the two run files say the same
        replayed = read_run(path.parent / "replay")
        self.assertEqual(recorded.keys(), replayed.keys())
        for key in recorded:
            self.assertEqual(recorded[key]["tokens"], replayed[key]["tokens"])
            self.assertEqual(recorded[key]["levels"], replayed[key]["levels"])
            self.assertEqual(recorded[key]["logprob"].tolist(), replayed[key]["logprob"].tolist())
        # once more: decoded anew, on other ranks, and told in a table
        again = pmpd("run", "--replay", path, ranks=3)
        self.assertIn(b"equal bit for bit, as it must be", again.stdout)
        self.assertIn(f"tokens             {n_tokens:10} {0:10}", again.stdout.decode())
        with h5py.File(path.parent / "replay" / "run.h5") as run:
            self.assertEqual(set(run["prompts"]["epoch"].tolist()), {1})
        # a replay is a run like another
        self.assertEqual(self.replay(path.parent / "replay" / "run.h5")["verdict"], "equal")

    def test_moved_model_and_fewer_prompts(self):
        path, moved = self.copy(), self.folder / "moved"
        shutil.copytree(self.nested, moved)
        said = self.replay(path, "--set", f"model.path={moved}", "--set", "prompts.limit=2", "--set",
                           f"output.dir={self.folder / 'out'}")
        self.assertEqual((said["verdict"], said["prompts"], said["prompts_left_out"]), ("equal", 2, N - 2))
        self.assertTrue((self.folder / "out" / "run.h5").exists())
        self.assertFalse((path.parent / "replay").exists())

    def test_reproducible_on_two_tensor_ranks(self):
        self.record("reproducible", parallel__reproducible=True)
        said = self.replay(self.copy("reproducible"), "--set", "parallel.tensor_ranks=2", ranks=2)
        self.assertEqual(said["verdict"], "equal")
        self.assertIn("as it must be", said["why"])
        self.assertEqual(said["differs_between_runs"]["parallel.tensor_ranks"]["matters_for"],
                         "cannot change tokens")
        self.assertIn("any of 1..8 tensor ranks that fits (reproducible, 8 segments)", said["invariant_under"])

    def test_failed_prompts_are_left_out(self):
        """A run that gave up prompt 3: it has no plan, and is not tried again."""
        path = self.copy()
        with h5py.File(path, "r+") as run:
            plans, switches, failed = run["plans"][:], run["plan_switches"][:], run["failed"].dtype
            for name in ("prompts", "steps"):
                rows, dtype, attributes = run[name][:], run[name].dtype, dict(run[name].attrs)
                del run[name]
                run.create_dataset(name, data=rows[rows["prompt"] != 3], dtype=dtype).attrs.update(attributes)
            plans = plans[plans["prompt"] != 3]
            plans["first_switch"] = [plans["n_switches"][:i].sum() for i in range(len(plans))]
            del run["plans"], run["plan_switches"], run["failed"]
            run["plans"] = plans
            run["plan_switches"] = switches[switches["prompt"] != 3]
            row = run.create_dataset("failed", (1,), failed)
            row[0] = (3, "story", 2, "broken")
        said = self.replay(path)
        self.assertEqual((said["prompts"], said["prompts_failed_recorded"], said["prompts_failed"]), (N - 1, 1, 0))
        with h5py.File(path.parent / "replay" / "run.h5") as run:
            self.assertEqual(run["failed"]["prompt"].tolist(), [3])
            self.assertIn(b"failed in the recorded run", run["failed"]["reason"][0])

    def test_stopped(self):
        path = self.copy()
        stopped = pmpd("run", "--replay", path, "--set", "run.deadline_s=0.001", ok=False)
        self.assertEqual((stopped.returncode, stopped.stdout), (75, b""))
        self.assertFalse((path.parent / "replay" / "run.h5").exists())
        self.change(path, "steps", "token", 5, 1)
        self.replay(path, code=1)
        # a replay that differs is a start that ended as it should
        journal = result("inspect", path.parent / "replay")["journal"]
        self.assertEqual((journal["starts"], journal["last_start"]), (2, "done"))

    # ---- different ----

    def test_changed_token(self):
        path = self.copy()
        with h5py.File(path) as run:
            row, old = run["steps"][30], int(run["steps"][30]["token"])
        self.change(path, "steps", "token", 30, old + 1)
        said = self.replay(path, code=1)
        self.assertIn(NOT_EXPECTED, said["why"])
        tokens = said["compared"]["tokens"]
        self.assertEqual((tokens["differ"], said["prompts_differ"]), (1, 1))
        first = tokens["first"]
        self.assertEqual([first[k] for k in ("prompt", "turn", "step", "recorded", "replayed")],
                         [int(row["prompt"]), int(row["turn"]), int(row["step"]), str(old + 1), str(old)])
        self.assertEqual(said["compared"]["logprobs"]["differ"], 0)
        self.assertGreater(said["tokens_not_compared"], 0)

    def test_changed_values(self):
        for field, what in (("logprob", "logprobs"), ("entropy", "entropies"), ("margin", "margins")):
            path = self.copy()
            with h5py.File(path) as run:
                value = run["steps"][7][field]
            self.change(path, "steps", field, 7, value + 1)
            said = self.replay(path, code=1)
            self.assertIn(NOT_EXPECTED, said["why"])
            self.assertEqual(said["compared"][what]["differ"], 1)
            self.assertAlmostEqual(said["compared"][what]["largest"], 1, places=5)
            self.assertEqual(said["compared"]["tokens"]["differ"], 0)
        path = self.copy()  # of the token that prefill yields
        self.change(path, "prompts", "entropy0", 2, float("nan"))
        first = self.replay(path, code=1)["compared"]["entropies"]["first"]
        self.assertEqual((first["step"], first["recorded"]), (-1, "nan"))

    def test_changed_plan(self):
        """A plan and its steps are changed together: the replay obeys and comes to something else."""
        path = self.copy()
        with h5py.File(path, "r+") as run:
            steps, switches = run["steps"][:], run["plan_switches"][:]
            steps["level"][(steps["prompt"] == 0) & (steps["step"] < 6)] = 2
            switches["level"][0] = 2
            run["steps"][...], run["plan_switches"][...] = steps, switches
        said = self.replay(path, code=1)
        self.assertEqual(said["compared"]["levels"]["differ"], 0)
        self.assertGreater(said["compared"]["entropies"]["differ"] + said["tokens_not_compared"], 0)
        self.assertEqual(said["prompts_differ"], 1)
        with h5py.File(path.parent / "replay" / "run.h5") as run:
            self.assertEqual(run["steps"]["level"].tolist(), steps["level"].tolist())

    def test_other_settings(self):
        """What differs and why: rounding is told from more than rounding, and from other tokens."""
        path = self.copy()
        ranks = ["--set", "parallel.tensor_ranks=2"]
        said = self.replay(path, *ranks, ranks=2)
        self.assertEqual(said["verdict"], "rounding")
        self.assertIn("equal but for rounding (at most ", said["why"])
        self.assertIn("parallel.tensor_ranks 1 -> 2", said["why"])
        self.assertEqual(said["compared"]["tokens"]["differ"], 0)
        self.assertGreater(said["compared"]["margins"]["differ"], 0)
        self.assertLess(said["compared"]["margins"]["largest"], 0.5)
        self.assertIn("2 tensor ranks only", said["invariant_under"])
        with h5py.File(path) as run:
            value = run["steps"][3]["entropy"]
        self.change(path, "steps", "entropy", 3, value + 1)
        self.assertIn("it is more than rounding", self.replay(path, *ranks, ranks=2, code=1)["why"])
        said = self.replay(self.copy(), "--set", "decode.seed=6", code=1)
        self.assertIn("a difference was to be expected: other tokens are asked for (decode.seed 5 -> 6)",
                      said["why"])

    def test_other_program(self):
        """Another revision: the same bits are found, but were not promised."""
        path = self.copy()
        with h5py.File(path, "r+") as run:
            run["provenance"].attrs["git_revision"] = "0123456789ab"
        said = self.replay(path)
        self.assertIn("equal bit for bit, which was not promised: git_revision 0123456789ab -> ", said["why"])
        self.assertEqual(said["differs_between_runs"]["git_revision"]["matters_for"], "program")

    # ---- refused ----

    def test_changed_files(self):
        path = self.copy()
        self.change(path, "plan_switches", "level", 1, 2)
        self.refused(path, says=["/steps and /plan_switches disagree", "its plan says 2"])
        path = self.copy()
        self.change(path, "plan_switches", "level", 1, 3)
        self.refused(path, says="row 1 of /plan_switches names level 3; the file has 3 levels")
        path = self.copy()
        with h5py.File(path) as run:
            plans, switches = run["plans"][:], run["plan_switches"][:]
            steps = run["steps"].dtype.descr
        self.put(path, "plans", plans[:-1])
        self.refused(path, says="/plan_switches")
        path = self.copy()
        self.put(path, "plan_switches", switches[:-2])
        self.refused(path, says=f"/plan_switches has {len(switches) - 2} rows; /plans expects {len(switches)}")
        path = self.copy()
        with h5py.File(path) as run:
            rows = run["steps"][:].astype([(n, "<f8" if n == "token" else t) for n, t in steps])
        self.put(path, "steps", rows)
        self.refused(path, says="column token of /steps has another type than pmpd writes")
        path = self.copy()
        data = path.read_bytes()
        path.write_bytes(data[:len(data) // 2])
        self.refused(path, says=str(path))

    def test_changed_provenance(self):
        for key, says in (("model_digest", "was recorded with another model: its digest is 0123"),
                          ("prompts_digest", "was recorded with another prompt file: its digest is 0123")):
            path = self.copy()
            with h5py.File(path, "r+") as run:
                run["provenance"].attrs[key] = "0123"
            self.refused(path, says=says)
        path = self.copy()
        with h5py.File(path, "r+") as run:
            run["provenance/config"][()] = run["provenance/config"][()].replace(b"slots", b"slits")
        self.refused(path, says=["run.h5:/provenance/config:", "decode.slits"])
        path = self.copy()
        with h5py.File(path, "r+") as run:
            run["levels"][...] = [(1, b"7", 7, 16, 7) if r["id"] == 1 else r for r in run["levels"][:]]
        self.refused(path, says=["policy \"replay\"", "level \"7\"", "do not hold 7 bits"])

    def test_wrong_use(self):
        path = self.copy()
        self.refused(path, self.top / "run.cfg", says="a FILE.cfg")
        self.refused(path, "--set", "policy.name=static", says="policy.name and policy.replay cannot be set")
        self.refused(path, "--set", f"output.dir={path.parent}", says="is the folder of the recorded run")
        self.refused(path, "--set", f"output.dir={self.top / 'run'}", says="is not the run file of a replay")
        self.refused(path, "--set", f"model.path={TINY}", says="another model")
        self.refused(path, "--set", f"prompts.path={PROMPTS}", says="another prompt file")
        self.refused(path, "--set", "prompts.split=validation", says="no prompt of split")
        self.refused(self.folder / "none.h5", says="none.h5: cannot open the run file")
        self.refused(self.prompts, says="prompts.jsonl: not an HDF5 file")
        self.record("few", prompts__limit=2)
        self.refused(self.copy("few"), "--set", "prompts.limit=3",
                     says=["no plan for prompt 2 (", "were fewer prompts recorded"])

    # ---- the policy in a configuration, provenance ----

    def test_plans_are_part_of_the_resume_key(self):
        self.record("other", policy__switches="0:2")
        replay = {"policy__name": "replay", "policy__replay": self.top / "run" / "run.h5", "decode__seed": 9}
        self.assertNotIn(b"resuming", self.record("both", **replay).stderr)
        self.assertIn(f"{N} of {N} prompts are done, 0 left", self.record("both", **replay).stderr.decode())
        replay["policy__replay"] = shutil.copy(self.top / "run" / "run.h5", self.folder)  # the same plans
        self.assertIn(f"{N} of {N} prompts are done, 0 left", self.record("both", **replay).stderr.decode())
        replay["policy__replay"] = self.top / "other" / "run.h5"
        self.assertIn(f"0 of {N} prompts are done, {N} left", self.record("both", **replay).stderr.decode())
        self.assertEqual(set(sum((r["levels"] for r in read_run(self.top / "both").values()), [])), {0})

    def test_product(self):
        """A run with one slot whose policy added tokens, and files older than the fact."""
        self.record("one", decode__slots=1)
        facts = result("inspect", self.top / "one")["provenance"]
        self.assertEqual(facts["product"], "one")
        self.assertIn("1 slot only", facts["invariant_under"])
        self.record("two", decode__slots=2)
        path = self.copy("two")
        with h5py.File(path, "r+") as run:
            text = run["provenance"]["config"][()].decode()
            self.assertIn("slots = 2", text)
            del run["provenance"]["config"]
            run["provenance"]["config"] = text.replace("slots = 2", "slots = 1")
        self.assertEqual(self.replay(path)["verdict"], "equal")  # by the recorded product, not by that of one slot
        facts = result("inspect", path.parent / "replay")["provenance"]
        self.assertEqual((facts["product"], facts["policy"]), ("slots", "replay_slots"))
        self.assertIn("any number of slots,", facts["invariant_under"])
        path = self.copy("one")
        with h5py.File(path, "r+") as run:
            del run["provenance"].attrs["product"], run["provenance"].attrs["invariant_under"]
        self.assertIn("1 slot only", result("inspect", path)["provenance"]["invariant_under"])
        self.assertIn(b"  invariant_under    any number of replicas and threads, ", pmpd("inspect", path).stdout)
        self.assertNotIn("product", self.replay(path)["differs_between_runs"])
        self.assertEqual(result("inspect", path.parent / "replay")["provenance"]["policy"], "replay")


if __name__ == "__main__":
    main()

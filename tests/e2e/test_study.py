"""experiments/report/study.py and oracle.py on run files made here, against numbers worked out by hand."""
import csv
import json
import subprocess
import sys

import h5py
import numpy as np

from common import TOP, Case, main

REPORT = TOP / "experiments" / "report"
STEP = [("prompt", "<i4"), ("turn", "<i4"), ("step", "<i4"), ("avg_bits", "<f4")]
PROMPT = [("prompt", "<i4"), ("turn", "<i4"), ("id", h5py.string_dtype()), ("prefill_avg_bits", "<f4")]
PLAN = [("prompt", "<i4"), ("turn", "<i4"), ("prefill_level", "<i4"), ("first_switch", "<i8"), ("n_switches", "<i4")]
SWITCH = [("prompt", "<i4"), ("turn", "<i4"), ("step", "<i4"), ("level", "<i4")]


def python(*args):
    return subprocess.run([sys.executable, *map(str, args)], check=True, stdout=subprocess.PIPE).stdout.decode()


class Study(Case):
    def write_run(self, name, bits, texts, budget=0):
        """A run of prompts a and b, prefill at 4 bits: bits (prompts, steps), texts of the answers."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        (folder / "answers.jsonl").write_text("".join(
            json.dumps({"question_id": i, "choices": [{"turns": [text]}]}) + "\n" for i, text in zip("ab", texts)))
        switch_at = [next((s for s, b in enumerate(row) if b < 4), None) for row in bits]
        switches = [[(p, 0, 0, 0)] * (at != 0) + [(p, 0, at, 1)] * (at is not None) for p, at in enumerate(switch_at)]
        with h5py.File(folder / "run.h5", "w") as run:
            run["steps"] = np.array([(p, 0, s, b) for p, row in enumerate(bits) for s, b in enumerate(row)], STEP)
            run["prompts"] = np.array([(p, 0, i, 4) for p, i in enumerate("ab")], PROMPT)
            run["levels"] = np.array([(b"4",), (b"2",)], [("text", h5py.string_dtype())])
            run["plans"] = np.array([(0, 0, 0, 0, len(switches[0])), (1, 0, 0, len(switches[0]), len(switches[1]))], PLAN)
            run["plan_switches"] = np.array(switches[0] + switches[1], SWITCH)
            run["budget"] = np.zeros(budget, [("lease", "<i8")])
            run.create_group("provenance").attrs["model_digest"] = "made " + name
            for key, value in (("avg_decode_bits", np.concatenate(bits).mean()), ("avg_prefill_bits", 4.0),
                               ("bytes_per_token", 1000.0), ("decode_tok_s", 50.0)):
                run[f"metrics/{key}"] = value
        return folder

    def setUp(self):
        super().setUp()
        self.tasks = self.folder / "tasks.jsonl"
        self.tasks.write_text("".join(json.dumps({"id": i, "task": "t", "split": "test", "facts": ["x", "y"]}) + "\n"
                                      for i in "ab"))
        self.low = self.write_run("low", [[2, 2], [2, 2]], ["", "x"])
        self.high = self.write_run("high", [[4, 4], [4, 4]], ["x y", "x y"])
        self.mine = self.write_run("mine", [[4, 2], [4, 4]], ["x y", "x y"], budget=2)

    def test_table(self):
        out = self.folder
        text = python(REPORT / "study.py", "table", "--tasks", self.tasks, "--bits", 3.5, "--out", out, "--curve",
                      self.high, self.low, "--runs", self.low, self.mine)
        rows = {row["run"]: row for row in csv.DictReader((out / "table.csv").read_text().splitlines())}
        # low: 0 of 2 facts and 1 of 2; resampling two prompts gives 0, 25 or 50 %
        self.assertEqual([float(rows["low"][k]) for k in ("score", "low", "high")], [25, 0, 50])
        self.assertEqual([float(rows["mine"][k]) for k in ("score", "low", "decode_bits", "steps")], [100, 100, 3.5, 2])
        # static at 3.5 bits, three quarters of the way from low to high: a .75 * 100, b .25 * 50 + .75 * 100
        got = [float(rows["mine"][k]) for k in ("against_static", "against_low", "against_high")]
        np.testing.assert_allclose(got, [100 - (75 + 87.5) / 2, 12.5, 25])
        self.assertIn("3.500 held", text)
        with h5py.File(out / "study.h5") as study:
            mine = study["runs/mine"]
            self.assertEqual(mine["provenance"].attrs["model_digest"], "made mine")
            self.assertEqual(list(mine["first_low"]), [1, -1])
            self.assertEqual(list(mine["histogram"]), [0, 1, 0, 0, 0, 0, 1])
            self.assertEqual(list(study["runs/low/changes"]), [1, 1])
            self.assertEqual(list(mine["bits"]), [3, 4])
            self.assertIn("high", study["runs"])

    def test_dial(self):
        """Half-way to an end not tried, then on the line: 1 / (1 + exp(4.5)) = 0.010987, and nine tenths of the way
        from there (2 bits) to 0.5 (3 bits) 1 / (1 + exp(0.45)) = 0.389361."""
        folder = self.folder / "dials"
        ask = (REPORT / "study.py", "dial", "--bits", 2.9, folder)
        self.assertEqual(float(python(*ask)), .5)
        self.write_run("dials/0.500000", [[4, 4], [2, 2]], ["", ""])
        self.assertEqual(float(python(*ask)), .010987)
        self.write_run("dials/0.010987", [[2, 2], [2, 2]], ["", ""])
        self.assertAlmostEqual(float(python(*ask)), .389361, places=5)
        self.assertEqual(float(python(*ask, "--nearest")), .5)

    def test_prompts(self):
        python(REPORT / "study.py", "prompts", "test", 3, self.folder / "out", self.tasks, self.tasks)
        self.assertEqual([json.loads(line)["id"] for line in (self.folder / "out").read_text().splitlines()], ["a", "a", "b"])

    def test_oracle_within_a_budget(self):
        """At 3 bits one prompt may stay high: a, which gains two facts; b gains one."""
        def plans(*args):
            python(REPORT / "oracle.py", "--tasks", self.tasks, *args, self.folder / "o", self.low, self.high)
            rows = map(json.loads, (self.folder / "o").read_text().splitlines())
            return {row["id"]: row["plan"] for row in rows}
        high, low = "prefill:4 0:4", "prefill:4 0:2"
        self.assertEqual(plans(), {"a": high, "b": high})
        self.assertEqual(plans("--bits", 3), {"a": high, "b": low})
        self.assertEqual(plans("--bits", 2), {"a": low, "b": low})


if __name__ == "__main__":
    main()

"""SIGKILL everywhere, then the same command again: the run file equals an uninterrupted run's, nothing that was
finished is decoded again, torn frames are cut, no temporary file stays. Every run directory is killed many times,
each start at another point."""
import shutil

import h5py

from common import main, pmpd
from faults import (DONE, DROPPED, DROPPED_SLOTS, DROPPED_WORLDS, FaultCase, differences, read_journal, start)

# (ranks, tensor ranks)
ALONE, REPLICAS, TENSOR, SQUARE = (0, 1), (2, 1), (2, 2), (4, 2)
# Work that only rank 1 is to be killed in must come to rank 1: rank 0 is slow.
SLOW = " decode:*:slow@rank=0 prefill:*:slow@rank=0"


class Kills(FaultCase):
    n_killed = {}

    def world_args(self, world):
        return ["--set", f"parallel.tensor_ranks={world[1]}"]

    def kill(self, config, name, fault, world):
        """One start that must be killed where the fault says."""
        before = read_journal(self.folder / name)[0]
        finished = {f["ordinal"] for k, f in before if k == "finished"}
        run = start(config, *self.world_args(world), fault=fault, ranks=world[0])
        self.assertTrue(run.faults, f"{fault}: did not happen\n{run.err}")
        self.assertNotEqual(run.code, DONE, fault)
        self.assertEqual({o for _, o in run.began} & finished, set(), f"{fault}: finished prompts begun again")
        after = [f["ordinal"] for k, f in read_journal(self.folder / name)[0] if k == "finished"]
        self.assertLessEqual(finished, set(after), f"{fault}: finished prompts were lost")
        self.check_gone(config)
        point = run.faults[0][1]
        Kills.n_killed[point] = Kills.n_killed.get(point, 0) + 1
        return run

    def kill_and_finish(self, name, kills, whole, dropped, last, **settings):
        """kills: [(fault, world)] one after the other on one run directory; then a plain start of world `last`."""
        config = self.config(name, **settings)
        cut = torn = False
        for fault, world in kills:
            run = self.kill(config, name, fault, world)
            cut += "of an unfinished or damaged record" in run.err
            torn += ":torn" in fault and fault.startswith("journal")
        run = start(config, *self.world_args(last), ranks=last[0])
        self.assertEqual(run.code, DONE, run.err)
        cut += "of an unfinished or damaged record" in run.err
        self.assertEqual(cut, torn, "torn frames that were reported as cut")
        self.check_whole(name, whole, dropped)
        run = start(config, *self.world_args(last), ranks=last[0])
        self.assertIn(f"{self.n_prompts} of {self.n_prompts} prompts are done, 0 left", run.err)
        self.check_whole(name, whole, dropped)

    def test_one_rank(self):
        settings = self.nested()
        self.assertEqual(start(self.config("whole", **settings)).code, DONE)
        kills = ["journal_write:1:torn", "load:1:kill", "load:30:kill", "journal_sync:1:kill", "prefill:1:kill",
                 "prefill:3:kill", "decode:1:kill", "decode:30:kill", "journal_write:3:torn", "journal_write:3:kill",
                 "journal_sync:5:kill", "finish:1:kill", "start:2:kill",
                 "run_write:1:kill", "run_write:1:torn", "run_sync:1:kill", "run_close:1:kill", "run_close:2:kill",
                 "run_rename:1:kill", "run_renamed:1:kill", "answers_write:1:torn", "answers_rename:1:kill",
                 "answers_renamed:1:kill"]
        self.kill_and_finish("killed", [(k, ALONE) for k in kills], "whole", DROPPED, ALONE, **settings)

    def test_two_replicas(self):
        settings = {**self.nested(), "decode__slots": 2}
        self.assertEqual(start(self.config("whole", **settings)).code, DONE)
        kills = ["load:12:kill@rank=1", "prefill:1:kill@rank=1" + SLOW, "prefill:2:kill@rank=0",
                 "decode:5:kill@rank=1" + SLOW, "decode:12:kill@rank=0", "journal_write:5:torn", "journal_sync:6:kill",
                 "finish:1:kill@rank=1" + SLOW, "decode:3:parent@rank=0", "decode:3:parent@rank=1" + SLOW,
                 "run_write:1:torn", "run_close:2:kill"]
        self.kill_and_finish("killed", [(k, REPLICAS) for k in kills], "whole", DROPPED_SLOTS + DROPPED_WORLDS, REPLICAS, **settings)

    def test_two_tensor_ranks(self):
        settings = {"decode__slots": 2, "parallel__tensor_ranks": 2}
        self.assertEqual(start(self.config("whole", **settings), ranks=2).code, DONE)
        kills = ["load:7:kill@rank=1", "prefill:2:kill@rank=1", "decode:2:kill@rank=1", "decode:40:kill@rank=0",
                 "journal_write:4:torn", "run_write:1:kill", "run_rename:1:kill"]
        self.kill_and_finish("killed", [(k, TENSOR) for k in kills], "whole", DROPPED_SLOTS, TENSOR, **settings)

    def test_other_ranks_at_every_start(self):
        """parallel.reproducible: one run directory, killed and resumed with other numbers of ranks each time."""
        settings = {**self.nested(), "parallel__reproducible": True}
        self.assertEqual(start(self.config("whole", **settings)).code, DONE)
        kills = [("load:3:kill@rank=3", SQUARE), ("decode:8:kill", ALONE), ("prefill:2:kill@rank=1", TENSOR),
                 ("decode:20:kill@rank=0", SQUARE), ("journal_sync:4:kill", REPLICAS), ("decode:30:kill@rank=1", TENSOR),
                 ("run_write:1:torn", SQUARE), ("run_close:1:kill", TENSOR), ("answers_write:1:kill", REPLICAS)]
        self.kill_and_finish("killed", kills, "whole", DROPPED + DROPPED_WORLDS, SQUARE, **settings)

    def test_zz_enough(self):
        """At least 40 kills, four of each sort (the other tests have run by now)."""
        n = self.n_killed
        print("killed:", ", ".join(f"{n[p]} {p}" for p in sorted(n)), "in all", sum(n.values()))
        self.assertGreaterEqual(sum(n.values()), 40)
        for sort in (("load",), ("prefill",), ("decode",), ("journal_write", "journal_sync"),
                     ("run_write", "run_sync"), ("run_close", "run_rename")):
            self.assertGreaterEqual(sum(n.get(p, 0) for p in sort), 4, sort)

    def test_comparison_sees_differences(self):
        """One bit of a number, a row, an attribute: each is found."""
        config = self.config("whole", prompts__limit=2)
        self.assertEqual(start(config).code, DONE)

        def bit(run):
            steps = run["steps"][:]
            steps["logprob"].view("u4")[7] ^= 1
            run["steps"][...] = steps

        def row(run):
            prompts = run["prompts"][:]
            prompts[0] = prompts[1]
            run["prompts"][...] = prompts

        def attribute(run):
            run["provenance"].attrs["seed"] = "1"

        def scalar(run):
            run["metrics/n_steps"][()] += 1

        for change in (bit, row, attribute, scalar):
            other = self.folder / change.__name__
            shutil.copytree(self.folder / "whole", other)
            self.assertEqual([d for d in differences(other, self.folder / "whole", DROPPED) if "config" not in d], [])
            with h5py.File(other / "run.h5", "r+") as run:
                change(run)
            self.assertNotEqual(differences(other, self.folder / "whole", DROPPED), [])


if __name__ == "__main__":
    main()

"""Prompts that break the program. After two faults a prompt is given up, and it alone; what else ends a run (a signal
to stop, the deadline, SIGKILL) never counts against a prompt."""
import h5py

from common import main
from faults import (DONE, DROPPED, DROPPED_FAILED, DROPPED_SLOTS, DROPPED_WORLDS, STOPPED, FaultCase, read_journal,
                    records_of, start)

POISON = 2  # in the middle: some prompts are longer, some shorter
# what /failed says about each action
REASONS = {"error": "an error that the test makes", "segv": "SIGSEGV", "abort": "SIGABRT", "nan": "the logits are not numbers"}


class Attempts(FaultCase):
    n_prompts = 6

    def poisoned(self, name, fault, whole, dropped, ranks=0, idle=None, slots=1, rank=0):
        """A prompt that breaks every start which tries it."""
        config = self.config(name, decode__slots=slots, decode__max_new_tokens=12,
                             parallel__tensor_ranks=2 if ranks == 4 else 1)
        action = fault.split("@")[0].split(":")[2]
        for attempt in (1, 2):
            run = start(config, fault=fault, ranks=ranks, idle=idle)
            self.assertEqual({f[3] for f in run.faults}, {action}, f"{fault}, start {attempt}: {run.err}")
            self.assertNotIn(run.code, (DONE, STOPPED), run.err)
            self.check_gone(config)
            mine = [f for f in records_of(self.folder / name, "fault") if f["epoch"] == attempt - 1]
            named = {f["ordinal"] for f in mine}
            self.assertIn(POISON, named)
            # a suspect is alone when it is tried again
            self.assertLessEqual(len(named), slots if attempt == 1 else 1, mine)
            self.assertTrue(all(f["n_company"] == len(named) for f in mine), mine)
            if action != "nan":  # a NaN is seen by all ranks of the replica
                self.assertEqual([f["rank"] for f in mine], [rank] * len(named))
            self.assertEqual([r for r in records_of(self.folder / name, "end") if r["epoch"] == attempt - 1], [])
        run = start(config, fault=fault, ranks=ranks, idle=idle)
        self.assertEqual(run.code, DONE, run.err)
        self.assertNotIn(POISON, [ordinal for _, ordinal in run.began])
        self.assertIn("warning", run.err)
        self.check_failed(name, REASONS[action])
        self.check_whole(name, whole, dropped, failed=POISON)
        return config

    def check_failed(self, name, reason):
        with h5py.File(self.folder / name / "run.h5") as file:
            failed = file["failed"][:]
            n_failed = int(file["metrics/n_failed"][()])
        self.assertEqual([int(f["prompt"]) for f in failed], [POISON])
        self.assertEqual(n_failed, 1)
        self.assertEqual(int(failed[0]["attempts"]), 2)
        self.assertIn(reason, failed[0]["reason"].decode())
        self.assertEqual([f["ordinal"] for f in records_of(self.folder / name, "failed")], [POISON])

    def whole(self, **settings):
        config = self.config("whole", decode__max_new_tokens=12, **settings)
        run = start(config, ranks=settings.get("parallel__tensor_ranks", 0))
        self.assertEqual(run.code, DONE, run.err)

    def test_one_rank(self):
        self.whole()
        for i, fault in enumerate(("prefill:*:error", "decode:*:segv", "decode:*:nan", "prefill:*:nan")):
            self.poisoned(f"one{i}", f"{fault}@prompt={POISON}", "whole", DROPPED + DROPPED_FAILED)

    def test_three_slots(self):
        self.whole(decode__slots=3)
        for i, fault in enumerate(("decode:*:error", "decode:*:segv", "decode:*:nan", "decode:*:abort")):
            self.poisoned(f"three{i}", f"{fault}@prompt={POISON}", "whole", DROPPED_SLOTS + DROPPED_FAILED, slots=3)

    def test_first_rank_of_two_replicas(self):
        self.whole()
        for i, (fault, slots) in enumerate((("decode:*:segv", 1), ("decode:*:error", 3))):
            whole = ["whole", "whole3"][i]
            if slots == 3:
                self.assertEqual(start(self.config(whole, decode__max_new_tokens=12, decode__slots=3)).code, DONE)
            self.poisoned(f"first{i}", f"{fault}@rank=0,prompt={POISON}", whole,
                          DROPPED_SLOTS + DROPPED_FAILED + DROPPED_WORLDS, ranks=2, idle=1, slots=slots)

    def test_tensor_rank_of_another_replica(self):
        """Four ranks; only replica 1 takes prompts; its second rank breaks."""
        for slots in (1, 3):
            self.whole(decode__slots=slots, parallel__tensor_ranks=2)
            for action in ("error", "segv", "nan"):
                self.poisoned(f"other{slots}{action}", f"decode:*:{action}@rank=3,prompt={POISON}", "whole",
                              DROPPED_SLOTS + DROPPED_FAILED + DROPPED_WORLDS, ranks=4, idle=0, slots=slots, rank=3)

    def test_retry(self):
        """--retry-failed gives a failed prompt another two attempts; without it, it stays failed."""
        self.whole()
        config = self.poisoned("again", f"decode:*:error@prompt={POISON}", "whole", DROPPED + DROPPED_FAILED)
        run = start(config)
        self.assertEqual(run.code, DONE, run.err)
        self.assertIn("warning", run.err)
        self.check_failed("again", REASONS["error"])
        run = start(config, "--retry-failed")
        self.assertEqual(run.code, DONE, run.err)
        self.check_whole("again", "whole", DROPPED)

    def test_one_fault_is_forgiven(self):
        """A prompt that broke once and then goes through is a finished prompt like any other."""
        self.whole()
        config = self.config("once", decode__max_new_tokens=12)
        run = start(config, fault=f"decode:3:segv@prompt={POISON}")
        self.assertEqual(len(run.faults), 1)
        run = start(config)
        self.assertEqual(run.code, DONE, run.err)
        self.check_whole("once", "whole", DROPPED)
        with h5py.File(self.folder / "once" / "run.h5") as file:
            self.assertEqual(len(file["failed"]), 0)

    def test_an_error_that_is_no_prompts_doing(self):
        """Errors while loading name no prompt: three of them, then all is done."""
        self.whole()
        config = self.config("load", decode__max_new_tokens=12)
        for ranks in (0, 2, 2):
            run = start(config, fault="load:5:error@rank=" + str(max(0, ranks - 1)), ranks=ranks)
            self.assertEqual(len(run.faults), 1)
            self.assertIn(REASONS["error"], run.err)
            self.assertEqual(run.code, 1, run.err)
        self.assertEqual(records_of(self.folder / "load", "fault"), [])
        self.assertEqual(start(config).code, DONE)
        self.check_whole("load", "whole", DROPPED)

    def test_stopping_does_not_count(self):
        """SIGTERM in the middle of the same prompt, again and again, on either rank; and the deadline."""
        self.whole()
        config = self.config("stop", decode__max_new_tokens=12)
        worlds = ((0, 0, 0), (2, 0, 1), (2, 1, 0), (0, 0, 0))
        for i, (ranks, rank, idle) in enumerate(worlds):
            run = start(config, fault=f"decode:4:term@rank={rank},prompt={POISON}", ranks=ranks,
                        idle=idle if ranks else None)
            self.assertEqual(len(run.faults), 1, run.err)
            self.assertEqual(run.code, STOPPED, run.err)
            self.assertIn("SIGTERM", run.err)
            self.assertEqual([r["how"] for r in records_of(self.folder / "stop", "end")], ["stopped"] * (i + 1))
            self.assertFalse((self.folder / "stop" / "run.h5").exists())
            self.check_gone(config)
        self.assertEqual(records_of(self.folder / "stop", "fault"), [])
        self.assertEqual(start(config).code, DONE)
        self.check_whole("stop", "whole", DROPPED)

    def test_deadline_does_not_count(self):
        self.whole()
        config = self.config("late", decode__max_new_tokens=12)
        for ranks in (0, 2, 0):
            run = start(config, "--set", "run.deadline_s=0.4", fault="decode:*:slow prefill:*:slow", ranks=ranks)
            self.assertEqual(run.code, STOPPED, run.err)
            self.assertIn("run.deadline_s", run.err)
        self.assertEqual(records_of(self.folder / "late", "fault"), [])
        self.assertEqual({r["how"] for r in records_of(self.folder / "late", "end")}, {"stopped"})
        self.assertEqual(start(config).code, DONE)
        self.check_whole("late", "whole", DROPPED)

    def test_silent_deaths(self):
        """SIGKILL names nobody: up to run.max_deaths starts in a row that finish nothing, then a refusal."""
        self.whole(run__max_deaths=2)
        config = self.config("dead", decode__max_new_tokens=12, run__max_deaths=2)
        for fault in ("decode:1:kill", "decode:20:kill", "decode:1:kill", "decode:1:kill"):
            run = start(config, fault=fault)  # the second one finishes a prompt: counting begins anew
            self.assertEqual(len(run.faults), 1, run.err)
        run = start(config)
        self.assertNotIn(run.code, (DONE, STOPPED))
        self.assertIn("max_deaths", run.err)
        self.assertIn("--retry-failed", run.err)
        self.assertEqual(run.began, [])
        n_records = len(read_journal(self.folder / "dead")[0])
        run = start(config)
        self.assertNotIn(run.code, (DONE, STOPPED), "a refusal does not wear off")
        self.assertLessEqual(len(read_journal(self.folder / "dead")[0]), n_records + 2)
        self.assertEqual(records_of(self.folder / "dead", "failed"), [])
        self.assertEqual(start(config, "--retry-failed").code, DONE)
        self.check_whole("dead", "whole", DROPPED)


if __name__ == "__main__":
    main()

"""Disks that are full, and run directories that only rank 0's host sees: a clear error, a journal that is intact, and
once there is room the same command gives an uninterrupted run's file."""
import os
import subprocess
import sys
import unittest

from common import main
from faults import (DONE, DROPPED, DROPPED_WORLDS, STOPPED, FaultCase, read_journal, start)

PAGE = 4096
MAY_MOUNT = os.environ.get("PMPD_TEST_MOUNTS") == "1"


def own_mounts():
    """Starts this script again in a mount namespace of its own: what it mounts goes when it ends."""
    mine = ["unshare", "--mount", sys.executable]
    try:
        may = subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        may = False
    if may and "PMPD_TEST_MOUNTS" not in os.environ:
        os.environ["PMPD_TEST_MOUNTS"] = "1"
        os.execvp(mine[0], [*mine, *sys.argv])


class Full(FaultCase):
    n_prompts = 8

    def config(self, name, **more):
        (self.folder / name).parent.mkdir(exist_ok=True)
        return super().config(name.replace("/", "-"), **{"output__dir": self.folder / name, **more})

    def whole(self):
        self.assertEqual(start(self.config("whole")).code, DONE)

    def check_refusal(self, run, name, path, advice="make room"):
        """The error names the file and what to do; the journal is whole, nothing half-written lies about."""
        self.assertNotIn(run.code, (DONE, STOPPED), run.err)
        errors = [line for line in run.err.splitlines() if "error:" in line]
        self.assertEqual(len(errors), 1, run.err)
        for part in (str(self.folder / name / path), advice):
            self.assertIn(part, errors[0])
        self.assertEqual(read_journal(self.folder / name)[1], 0, "bytes behind the last record of the journal")
        self.assertEqual([p.name for p in (self.folder / name).iterdir() if ".tmp" in p.name], [])

    def resume(self, name, config, dropped=DROPPED, **options):
        run = start(config, **options)
        self.assertEqual(run.code, DONE, run.err)
        self.check_whole(name, "whole", dropped)

    def test_faults(self):
        """The system calls say that the disk is full, or broken, at every place in turn."""
        self.whole()
        for i, (fault, ranks, path, advice) in enumerate((
                ("journal_write:1:enospc", 0, "journal.bin", "make room"),
                ("journal_write:4:enospc", 0, "journal.bin", "make room"),
                ("journal_write:7:enospc", 2, "journal.bin", "make room"),
                ("journal_sync:6:error", 0, "journal.bin", "check the file system"),
                ("run_write:1:enospc", 2, "run.h5", "make room"),
                ("run_sync:1:error", 0, "run.h5", "check the file system"),
                ("answers_write:1:enospc", 0, "answers.jsonl", "make room"))):
            name = f"fault{i}"
            config = self.config(name)
            run = start(config, fault=fault, ranks=ranks)
            self.assertEqual(len(run.faults), 1, run.err)
            self.check_refusal(run, name, path, advice)
            self.check_gone(config)
            self.resume(name, config, DROPPED + DROPPED_WORLDS, ranks=ranks)

    @unittest.skipUnless(MAY_MOUNT, "mounting needs root")
    def test_small_disk(self):
        """A tmpfs that really fills up: the journal, then run.h5, then answers.jsonl."""
        self.whole()
        config = self.config("small")
        small = self.folder / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)

        def leave(n_bytes):
            """Fills the disk up to so many bytes, whole pages."""
            filler = small / "filler"
            filler.unlink(missing_ok=True)
            room = os.statvfs(small)
            free = room.f_bavail * room.f_bsize
            filler.write_bytes(b"x" * (free - (n_bytes + PAGE - 1) // PAGE * PAGE))

        leave((self.folder / "whole" / "journal.bin").stat().st_size // 2 // PAGE * PAGE)
        run = start(config)
        self.check_refusal(run, "small", "journal.bin")
        n_finished = sum(kind == "finished" for kind, _ in read_journal(small)[0])
        self.assertGreater(n_finished, 0)
        self.assertLess(n_finished, self.n_prompts)
        run = start(config, ranks=2)  # still full
        self.check_refusal(run, "small", "journal.bin")

        (small / "filler").unlink()
        self.assertEqual(len(start(config, fault="run_write:1:kill").faults), 1)
        leave(2 * PAGE)
        self.check_refusal(start(config), "small", "run.h5")
        run_bytes = (self.folder / "whole" / "run.h5").stat().st_size
        # the journal grows by a little: where its last page has no room for that, it gets one more
        used = (small / "journal.bin").stat().st_size % PAGE
        leave(run_bytes + (0 if 0 < used < PAGE - 1024 else PAGE))
        self.check_refusal(start(config), "small", "answers.jsonl")
        self.assertTrue((small / "run.h5").exists())
        (small / "filler").unlink()
        self.resume("small", config)

    @unittest.skipUnless(MAY_MOUNT, "mounting needs root")
    def test_directory_of_rank_0_only(self):
        """Other ranks see an empty, read-only folder where the run directory should be."""
        self.whole()
        first = self.folder / "first"
        config = self.config("first/run")
        hide = ["unshare", "--mount", "sh", "-c",
                'mount -t tmpfs -o ro,size=4k tmpfs "$0" && test -z "$(ls "$0")" && exec "$@"', str(first)]
        run = start(config, fault="decode:20:kill@rank=0", ranks=3, others=hide)
        self.assertEqual(len(run.faults), 1, run.err)
        self.assertTrue((first / "run" / "journal.bin").exists())
        run = start(config, fault="journal_write:3:enospc", ranks=3, others=hide)
        self.check_refusal(run, "first/run", "journal.bin")
        self.resume("first/run", config, DROPPED + DROPPED_WORLDS, ranks=3, others=hide)
        self.assertIn("0 left", start(config).err)


if __name__ == "__main__":
    own_mounts()
    main()

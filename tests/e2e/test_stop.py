"""Runs that are stopped (signals, the deadline) end with exit code 75 and what is finished; the same command goes
on, and in the end the run file is that of an uninterrupted run. Runs that die without a word are tried again, but
not for ever."""
import json
import os
import pathlib
import re
import signal
import subprocess
import time

import numpy as np

from common import TINY, TOP, Case, command, environment, main, pmpd, read_run, write_config

PROMPTS = TOP / "experiments" / "tasks" / "tiny_mixed.jsonl"
N = 24
STOPPED, USER_ERROR = 75, 2


def catches(pid, number):
    """Whether the process has a handler for the signal."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


def wait_for(what, seconds=60):
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            raise AssertionError("waited in vain")
        time.sleep(0.002)


class Stop(Case):
    def config(self, name, **more):
        path = self.folder / f"{name}.cfg"
        settings = {"model__path": TINY, "prompts__path": PROMPTS, "prompts__limit": N, "decode__slots": 2,
                    "policy__name": "fixed", "policy__prefill": "max", "policy__level": "max",
                    "decode__max_new_tokens": 120, "output__dir": self.folder / name, "backend__threads": 1}
        settings.update(more)
        write_config(path, **settings)
        return path

    def start(self, *args, ranks=0):
        run = subprocess.Popen(command("run", *args, ranks=ranks), env=environment(), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(lambda: run.poll() is None and run.kill())
        return run

    def ranks_of(self, run):
        """The processes of mpirun's ranks, in the order of ranks."""
        pids = subprocess.run(["pgrep", "-P", str(run.pid)], stdout=subprocess.PIPE).stdout.split()
        def rank(pid):
            words = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            return next((int(w.split(b"=")[1]) for w in words if w.startswith(b"OMPI_COMM_WORLD_RANK=")), -1)
        return [pid for pid in sorted(map(int, pids), key=rank) if rank(pid) >= 0]

    def stopped(self, run, by, n=N):
        """The run ends as a stopped one; returns how many prompts were done."""
        out, err = (text.decode() for text in run.communicate(timeout=60))
        self.assertEqual(run.returncode, STOPPED, err)
        self.assertEqual(out, "")
        said = re.search(rf"^pmpd: stopped by {by}: (\d+) of {n} prompts are done; the same command resumes$", err, re.M)
        self.assertTrue(said, err)
        self.assertNotIn("error", err.lower().replace("a non-zero exit", ""))
        return int(said[1])

    def journal(self, name):
        return json.loads(pmpd("inspect", self.folder / name, "--json").stdout)["journal"]

    def in_the_middle(self, run, name):
        """Waits until one more prompt is finished."""
        file = self.folder / name / "journal.bin"
        size = lambda: file.stat().st_size if file.exists() else 0
        before = size()
        wait_for(lambda: run.poll() is not None or size() > before + 2500)
        self.assertIsNone(run.poll(), "the run ended before it could be stopped")

    def compare(self, name, other="whole"):
        whole, resumed = read_run(self.folder / other), read_run(self.folder / name)
        self.assertEqual(whole.keys(), resumed.keys())
        for key in whole:
            self.assertEqual(whole[key]["tokens"], resumed[key]["tokens"])
            self.assertEqual(whole[key]["levels"], resumed[key]["levels"])
            np.testing.assert_array_equal(whole[key]["logprob"], resumed[key]["logprob"])
            np.testing.assert_array_equal(whole[key]["entropy"], resumed[key]["entropy"])

    def test_signals(self):
        """Alone, then under mpirun: to mpirun, and to one rank of two; all on one run directory."""
        pmpd("run", self.config("whole"))
        config = self.config("stopped")
        done = 0
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGUSR1:
            run = self.start(config)
            self.in_the_middle(run, "stopped")
            run.send_signal(number)
            now = self.stopped(run, f"{number.name} on rank 0")
            self.assertGreater(now, done)
            done = now
        for to_rank in None, 1:
            run = self.start(config, ranks=2)
            self.in_the_middle(run, "stopped")
            if to_rank is None:
                run.send_signal(signal.SIGUSR1)
                now = self.stopped(run, r"SIGUSR1 on rank \d")
            else:
                os.kill(self.ranks_of(run)[to_rank], signal.SIGTERM)
                now = self.stopped(run, "SIGTERM on rank 1")
            self.assertGreater(now, done)
            done = now
        self.assertFalse((self.folder / "stopped" / "run.h5").exists())
        journal = self.journal("stopped")
        self.assertEqual((journal["starts"], journal["finished"]), (5, done))
        self.assertEqual((journal["last_start"], journal["silent_deaths"]), ("stopped", 0))
        self.assertIn("SIGTERM on rank 1", journal["reason"])
        again = pmpd("run", config)
        self.assertIn(f"resuming: {done} of {N} prompts are done, {N - done} left", again.stderr.decode())
        self.compare("stopped")
        self.assertEqual(self.journal("stopped")["last_start"], "done")

    def test_tensor_ranks(self):
        """Ranks that wait for each other in every layer stop together."""
        few = {"parallel__tensor_ranks": 2, "prompts__limit": 6, "decode__max_new_tokens": 60}
        config = self.config("tensor", **few)
        run = self.start(config, ranks=2)
        self.in_the_middle(run, "tensor")
        os.kill(self.ranks_of(run)[1], signal.SIGTERM)
        self.stopped(run, "SIGTERM on rank 1", 6)
        pmpd("run", config, ranks=2)
        pmpd("run", self.config("whole", **few), ranks=2)
        self.compare("tensor")

    def test_deadline(self):
        config = self.config("deadline", backend__name="cpu_ref", run__deadline_s=0.01)
        run = self.start(config) # over before anything is loaded
        self.assertEqual(self.stopped(run, r"run\.deadline_s"), 0)
        run = self.start(config, "--set", "run.deadline_s=1.5")
        began = time.monotonic()
        self.assertLess(self.stopped(run, r"run\.deadline_s"), N)
        self.assertGreater(time.monotonic() - began, 1)
        self.assertEqual(self.journal("deadline")["last_start"], "stopped")
        self.assertFalse((self.folder / "deadline" / "run.h5").exists())

    # ---- before the first pass ----

    def held(self, name, ranks=0):
        """A run that waits in its first collective: rank 0 reads its configuration from a pipe. Returns it and what
        lets it go on."""
        config, pipe = self.config(name), self.folder / "pipe.cfg"
        os.mkfifo(pipe)
        run = self.start(pipe, ranks=ranks)
        wait_for(lambda: len(self.ranks_of(run)) == ranks)
        pids = self.ranks_of(run) if ranks else [run.pid]
        wait_for(lambda: all(catches(pid, signal.SIGUSR1) for pid in pids))
        return run, pids, lambda: pipe.write_text(config.read_text())

    def test_before_the_first_pass(self):
        for ranks, to in (0, 0), (2, 1):
            name = f"early{ranks}"
            run, pids, go_on = self.held(name, ranks)
            os.kill(pids[to], signal.SIGTERM)
            go_on()
            self.assertEqual(self.stopped(run, f"SIGTERM on rank {to}"), 0)
            journal = self.journal(name)
            self.assertEqual((journal["starts"], journal["last_start"]), (1, "stopped"))
            (self.folder / "pipe.cfg").unlink()

    def test_twice_ends_at_once(self):
        run, _, _ = self.held("twice")
        run.send_signal(signal.SIGINT)
        time.sleep(1.3) # sooner it is taken for the same wish, handed on twice
        self.assertIsNone(run.poll())
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=20)
        self.assertEqual(run.returncode, -signal.SIGINT)

    # ---- after the last ----

    def test_files_are_written_anew(self):
        """Killed while it wrote its files: the next start decodes nothing and writes them."""
        config = self.config("files", prompts__limit=3)
        pmpd("run", config)
        os.rename(self.folder / "files", self.folder / "whole")
        self.folder.joinpath("files").mkdir()
        os.link(self.folder / "whole" / "journal.bin", self.folder / "files" / "journal.bin")
        (self.folder / "files" / "run.h5.tmp.12345").write_bytes(b"half a file")
        again = pmpd("run", config)
        self.assertIn("3 of 3 prompts are done, 0 left", again.stderr.decode())
        self.compare("files")
        self.assertEqual(sorted(os.listdir(self.folder / "files")), ["answers.jsonl", "journal.bin", "run.h5"])
        for name in "files", "whole":
            self.assertEqual(len((self.folder / name / "answers.jsonl").read_text().splitlines()), 3)

    # ---- deaths without a word ----

    def test_silent_deaths(self):
        config = self.config("deaths", run__max_deaths=2, backend__name="cpu_ref")
        journal = self.folder / "deaths" / "journal.bin"
        for n in range(2):
            size = journal.stat().st_size if n else 0
            run = self.start(config)
            wait_for(lambda: journal.exists() and journal.stat().st_size > size)
            run.kill()
            run.communicate()
            self.assertEqual(self.journal("deaths")["silent_deaths"], n + 1)
        for _ in range(2): # a refusal is no start, and does not count
            refused = pmpd("run", config, ok=False)
            self.assertEqual(refused.returncode, USER_ERROR)
            for words in "2 starts", "run.max_deaths = 2", "--retry-failed", str(self.folder / "deaths"):
                self.assertIn(words, refused.stderr.decode())
        state = self.journal("deaths")
        self.assertEqual((state["starts"], state["silent_deaths"], state["last_start"]), (2, 2, "silent"))
        # the machine, not the settings, is to blame: other settings are refused, too, and their retry counts for all
        other = self.config("other", run__max_deaths=2, output__dir=self.folder / "deaths", prompts__limit=2)
        self.assertEqual(pmpd("run", other, ok=False).returncode, USER_ERROR)
        pmpd("run", other, "--retry-failed")
        self.assertEqual(self.journal("deaths")["silent_deaths"], 0)
        run = self.start(config)
        wait_for(lambda: self.journal("deaths")["last_start"] == "silent")
        run.send_signal(signal.SIGTERM)
        self.stopped(run, "SIGTERM on rank 0")


if __name__ == "__main__":
    main()

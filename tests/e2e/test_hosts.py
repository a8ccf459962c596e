"""Three hosts (network namespaces, tests/hosts/hosts.sh): cut off, killed, stopped. The run ends with an error that
names the cause, no process stays anywhere, and the same command again gives an uninterrupted run's file."""
import ctypes
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import unittest

from common import TOP, main
from faults import (DONE, DROPPED, DROPPED_WORLDS, STOPPED, FaultCase, Running, records_of, start)

HOSTS = str(TOP / "tests" / "hosts" / "hosts.sh")
N = 3
NAMED_S = 30  # an error must have named the cause by then ...
GONE_S = 40   # ... and nothing may be left by then
SLOW = "decode:*:slow prefill:*:slow"  # 20 ms a pass: enough time to break things
PR_SET_PDEATHSIG = 1  # linux/prctl.h
DROPPED_HOSTS = DROPPED + DROPPED_WORLDS + [("/provenance@host", "h1, and where the test runs")]


def in_worlds():
    """Starts this script again among N hosts: in two worlds side by side, because waiting for silence takes long."""
    if "PMPD_HOSTS" in os.environ:
        return
    if subprocess.run([HOSTS, "1", "true"]).returncode == 77:
        sys.exit(77)
    patient = [name for name in unittest.defaultTestLoader.getTestCaseNames(Hosts) if "_link_" in name]
    rest = [name for name in unittest.defaultTestLoader.getTestCaseNames(Hosts) if "_link_" not in name]
    worlds = [[f"Hosts.{name}" for name in names] for names in (patient, rest)] if len(sys.argv) == 1 else [sys.argv[1:]]
    running = [subprocess.Popen([HOSTS, str(N), sys.executable, sys.argv[0], *names], preexec_fn=die_with_parent)
               for names in worlds]
    sys.exit(max([world.wait() for world in running]))


def die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def hosts(*words):
    return subprocess.run([HOSTS, *map(str, words)], stdout=subprocess.PIPE, check=False).stdout.decode()


def pids(host):
    return [int(p) for p in hosts("pids", host).split()]


def program_on(host):
    """The rank of a host."""
    for pid in pids(host):
        words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[0].endswith(b"pmpd_faulty"):
            return pid
    raise AssertionError(f"no rank on host {host}")


def settings_of_users():
    """What slurm/env.sh exports: Open MPI's own patience with a silent host is among it."""
    text = subprocess.run(["sh", "-c", f". {TOP}/slurm/env.sh && env"], stdout=subprocess.PIPE, check=True).stdout
    return {k: v for k, _, v in (line.partition("=") for line in text.decode().splitlines())
            if k.startswith("OMPI_MCA_oob")}


class Watched(Running):
    """A run whose messages are kept with the time they came at."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.heard = []  # (seconds, line)
        self.thread = threading.Thread(target=self.listen)
        self.thread.start()

    def listen(self):
        for line in self.process.stderr:
            self.heard.append((time.monotonic(), line.decode(errors="replace").rstrip()))

    def text(self):
        return "\n".join(line for _, line in self.heard)

    def finish(self, limit_s=60):
        """Waits for the end of mpirun; its exit code."""
        self.wait_for(lambda: self.process.poll() is not None, "end of the run", limit_s)
        self.thread.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return self.process.returncode

    def wait_for(self, condition, what, limit_s):
        until = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > until:
                raise AssertionError(f"after {limit_s} s: no {what}\n{self.text()}")
            time.sleep(0.05)


class Hosts(FaultCase):
    n_prompts = 12

    def config(self, name, **more):
        return super().config(name, parallel__reproducible=True, **more)

    def make_whole(self, name, **more):
        """An uninterrupted run of one rank on one host."""
        self.assertEqual(start(self.config(name, **more)).code, DONE)
        return name

    def run_over_hosts(self, config, ranks=N, fault=None):
        return Watched(config, fault=fault, ranks=ranks, mpirun=(HOSTS, "mpirun"), **settings_of_users())

    def begin(self, name, fault=SLOW, ranks=N, **more):
        """A run over the hosts with at least two finished prompts."""
        self.config_path, self.n_ranks = self.config(name, **more), ranks
        self.whole = self.make_whole("whole", **{**more, "parallel__tensor_ranks": 1})
        self.addCleanup(self.kill_all)
        run = self.run_over_hosts(self.config_path, self.n_ranks, fault)
        run.wait_for(lambda: len(records_of(self.folder / name, "finished")) >= 2 or run.process.poll() is not None,
                     "finished prompt", 60)
        self.assertIsNone(run.process.poll(), run.text())
        return run

    def kill_all(self):
        for host in range(1, N + 1):
            hosts("heal", host)
            hosts("kill", host)

    def check_end(self, run, name, since, *words):
        """An error with the words, in time; then nothing is left; then a resumed run is complete."""
        def named():
            return [t for t, line in run.heard if "error:" in line and all(re.search(w, line) for w in words)]
        if words:
            run.wait_for(lambda: named() or run.process.poll() is not None, f"error with {words}", NAMED_S)
            self.assertTrue(named(), run.text())
            print(f"\n    {name}: the cause was named after {named()[0] - since:.1f} s", end="")
        run.wait_for(lambda: run.process.poll() is not None, "end of mpirun", GONE_S)
        print(f"\n    {name}: mpirun ended after {time.monotonic() - since:.1f} s", end="")
        run.wait_for(lambda: not any(pids(h) for h in range(1, N + 1)), "end of every process", GONE_S)
        print(f", the last process after {time.monotonic() - since:.1f} s", flush=True)
        self.assertNotIn(run.finish(), (DONE, STOPPED))
        for host in range(1, N + 1):
            hosts("heal", host)
        self.resume(name)

    def resume(self, name):
        run = self.run_over_hosts(self.config_path, self.n_ranks)
        self.assertEqual(run.finish(), DONE, run.text())
        self.check_whole(name, self.whole, DROPPED_HOSTS)
        self.assertEqual(records_of(self.folder / name, "failed"), [])

    def test_a_run_over_hosts(self):
        """The same as a run on one host, with the run directory on h1 only."""
        first = self.folder / "first"
        first.mkdir()
        os.environ["HOSTS_FIRST_ONLY"] = str(first)
        self.addCleanup(os.environ.pop, "HOSTS_FIRST_ONLY")
        self.make_whole("whole")
        config = self.config("over", output__dir=first / "over")
        run = self.run_over_hosts(config, fault=SLOW)  # so that every replica gets some of the prompts
        self.assertEqual(run.finish(), DONE, run.text())
        replicas = {r["replica"] for r in records_of(first / "over", "start")}
        self.assertEqual(replicas, set(range(N)))
        self.check_whole("first/over", "whole", DROPPED_HOSTS)

    def test_b_link_cut_for_good(self):
        run = self.begin("cut")
        hosts("cut", 3)
        self.check_end(run, "cut", time.monotonic(), "rank 2", r"\bh3\b")

    def test_b_link_of_the_first_host_cut(self):
        """The host of rank 0 and of mpirun itself: the others cannot tell anybody, but they end."""
        run = self.begin("cut1")
        hosts("cut", 1)
        self.check_end(run, "cut1", time.monotonic(), r"rank [12]", r"\bh[23]\b")

    def test_c_host_killed(self):
        run = self.begin("host")
        hosts("kill", 2)
        self.check_end(run, "host", time.monotonic(), "rank 1", r"\bh2\b")

    def test_c_first_host_killed(self):
        """With mpirun and rank 0 on it: nobody is left to say so, but the others end."""
        run = self.begin("host1")
        hosts("kill", 1)
        self.check_end(run, "host1", time.monotonic())

    def test_d_rank_killed(self):
        run = self.begin("rank")
        os.kill(program_on(2), signal.SIGKILL)
        self.check_end(run, "rank", time.monotonic(), "rank 1", r"\bh2\b")

    def test_e_rank_stopped(self):
        """A rank that hangs inside a collective of its replica."""
        run = self.begin("stopped", f"decode:70:stop@rank=1 {SLOW}", 2, parallel__tensor_ranks=2, parallel__timeout_s=5.0)
        run.wait_for(lambda: ["fault", "1", "decode", "70", "stop"] in run.lines(), "stop", 30)
        self.check_end(run, "stopped", time.monotonic(), r"(all-reduce|all-gather|broadcast)", r"has lasted",
                       r"parallel\.timeout_s")

    def test_f_link_cut_and_healed(self):
        run = self.begin("healed")
        hosts("cut", 3)
        time.sleep(5)
        hosts("heal", 3)
        self.assertEqual(run.finish(), DONE, run.text())
        self.check_whole("healed", "whole", DROPPED_HOSTS)


if __name__ == "__main__":
    in_worlds()
    main()

"""Three hosts (network namespaces, tests/hosts/hosts.sh): cut off, killed, stopped. The run ends with an error that
names the cause, no process stays anywhere, and the same command again gives an uninterrupted run's file."""
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
NAMED_S = 30      # an error must have named the cause by then
SLOW = "decode:*:slow prefill:*:slow"  # 20 ms a pass: enough time to break things
DROPPED_HOSTS = DROPPED + DROPPED_WORLDS + [("/provenance@host", "h1, and where the test runs")]


def in_world():
    """Starts this script again among N hosts."""
    if "PMPD_HOSTS" not in os.environ:
        may = subprocess.run([HOSTS, "1", "true"]).returncode
        if may == 77:
            sys.exit(77)
        os.execv(HOSTS, [HOSTS, str(N), sys.executable, *sys.argv])


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

    def setUp(self):
        super().setUp()
        self.assertEqual(start(self.config("whole")).code, DONE)

    def config(self, name, **more):
        return super().config(name, parallel__reproducible=True, **more)

    def run_over_hosts(self, config, ranks=N, fault=None):
        return Watched(config, fault=fault, ranks=ranks, mpirun=(HOSTS, "mpirun"), **settings_of_users())

    def begin(self, name, ranks=N, **more):
        """A run over the hosts with at least two finished prompts."""
        self.config_path, self.n_ranks, self.whole = self.config(name, **more), ranks, "whole"
        if more:
            self.whole = f"{name}-whole"
            self.assertEqual(start(self.config(self.whole, **{**more, "parallel__tensor_ranks": 1})).code, DONE)
        self.addCleanup(self.kill_all)
        run = self.run_over_hosts(self.config_path, self.n_ranks, SLOW)
        run.wait_for(lambda: len(records_of(self.folder / name, "finished")) >= 2 or run.process.poll() is not None,
                     "finished prompt", 60)
        self.assertIsNone(run.process.poll(), run.text())
        return run

    def kill_all(self):
        for host in range(1, N + 1):
            hosts("heal", host)
            hosts("kill", host)

    def check_end(self, run, name, since, *words, all_gone_s=NAMED_S + 10, named_s=NAMED_S):
        """An error with the words, in time; then nothing is left; then a resumed run is complete."""
        def named():
            return [t for t, line in run.heard if "error:" in line and all(re.search(w, line) for w in words)]
        run.wait_for(lambda: named() or run.process.poll() is not None, f"error with {words}", named_s)
        self.assertTrue(named(), run.text())
        run.wait_for(lambda: run.process.poll() is not None, "end of mpirun", all_gone_s)
        ended_s = time.monotonic() - since
        run.wait_for(lambda: not any(pids(h) for h in range(1, N + 1)), "end of every process", all_gone_s)
        gone_s = time.monotonic() - since
        self.assertNotIn(run.finish(), (DONE, STOPPED))
        print(f"\n    {name}: the cause named after {named()[0] - since:.1f} s, mpirun ended after {ended_s:.1f} s, "
              f"the last process after {gone_s:.1f} s", flush=True)
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

    def test_d_rank_killed(self):
        run = self.begin("rank")
        os.kill(program_on(2), signal.SIGKILL)
        self.check_end(run, "rank", time.monotonic(), "rank 1", r"\bh2\b")

    def test_e_rank_stopped(self):
        """A rank that hangs inside a collective of its replica."""
        run = self.begin("stopped", ranks=2, parallel__tensor_ranks=2, parallel__timeout_s=5.0)
        os.kill(program_on(2), signal.SIGSTOP)
        self.check_end(run, "stopped", time.monotonic(), r"has lasted", r"parallel\.timeout_s")

    def test_f_link_cut_and_healed(self):
        run = self.begin("healed")
        hosts("cut", 3)
        time.sleep(5)
        hosts("heal", 3)
        self.assertEqual(run.finish(), DONE, run.text())
        self.check_whole("healed", "whole", DROPPED_HOSTS)


if __name__ == "__main__":
    in_world()
    main()

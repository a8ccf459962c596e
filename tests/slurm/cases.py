"""slurm/run.sbatch on the cluster that run.sh started: jobs that run through, are signalled, cancelled,
requeued, lose nodes. Each must end with the tokens of an undisturbed run, decoding no prompt twice.

SPDX-License-Identifier: Apache-2.0
"""
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "e2e"))

import numpy as np

from common import PMPD, TINY, TOP, Case, environment, main, pmpd, read_run, write_config

STATE = os.environ["PMPD_SLURM_STATE"]
PROMPTS = TOP / "experiments" / "tasks" / "tiny_story.jsonl"
N = 40  # prompts: some seconds of work, so that there is a middle
PATIENCE_S = 90  # for anything to happen on a busy machine
FINISHED = 3  # kind of a finished prompt's record in the journal


def job_environment(**more):
    """Four nodes are one host here: its ranks must not take each other for neighbours by shared memory,
    and see the same network, the host's own."""
    env = environment()
    env.update(OMPI_MCA_btl="tcp,self", OMPI_MCA_btl_tcp_if_include="lo", PMPD=PMPD, **more)
    return env


def slurm(*command, **env):
    done = subprocess.run([str(c) for c in command], cwd=TOP, env=job_environment(**env), timeout=PATIENCE_S,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = done.stdout.decode(errors="replace").strip()
    if done.returncode != 0:
        raise AssertionError(f"{command}: exit {done.returncode}: {text}")
    return text


def n_finished(directory):
    """Finished prompts in a journal that is being written: whole frames of magic, kind, length, CRC."""
    try:
        data = (pathlib.Path(directory) / "journal.bin").read_bytes()
    except FileNotFoundError:
        return 0
    at = n = 0
    while at + 16 <= len(data):
        kind, length = struct.unpack_from("<II", data, at + 4)
        at += 16 + length
        n += kind == FINISHED and at <= len(data)
    return n


def rank_processes(folder):
    """The ranks of jobs whose configuration lies in the folder."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if command[0] == PMPD.encode() and str(folder).encode() in b" ".join(command):
            found.append(int(entry.name))
    return sorted(found)


class Job:
    """A batch job of run.sbatch, or of another script."""

    def __init__(self, folder, config, options=(), script=TOP / "slurm" / "run.sbatch", **env):
        self.log = folder / "job-%j.log"
        self.id = slurm("sbatch", "--parsable", "--ntasks-per-node=1", f"--output={self.log}", *options, script,
                        config, **env)
        self.log = pathlib.Path(str(self.log).replace("%j", self.id))

    def facts(self):
        text = slurm("scontrol", "show", "job", "-o", self.id)
        return dict(f.split("=", 1) for f in text.split() if "=" in f)

    def text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, reached, what):
        """Until reached() says something; a job that ends before is a failure of the test."""
        end = time.time() + PATIENCE_S
        while time.time() < end:
            found = reached()
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"job {self.id}: no {what} within {PATIENCE_S} s: {self.facts()}\n{self.text()}")

    def state(self, *wanted):
        def reached():
            facts = self.facts()
            return facts if facts["JobState"] in wanted else None
        return self.wait(reached, " or ".join(wanted))

    def middle(self, directory, n=4):
        """In the middle of its work: some prompts are finished, far from all."""
        self.wait(lambda: n_finished(directory) >= n, f"{n} finished prompts")
        if n_finished(directory) > N - 8:
            raise AssertionError("the run was too short for a middle: raise N")

    def requeued(self):
        """Waits until it is in the queue again and starts it soon: Slurm would let two minutes pass. Not in the
        same second: slurmd counts in those, and takes the new start for the old one that it has ended."""
        facts = self.state("PENDING")
        slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now+2seconds")
        return facts

    def end(self):
        return self.state("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")

    def kill_node(self, first):
        """The power cut of the job's first or last node."""
        nodes = slurm("scontrol", "show", "hostnames", self.facts()["NodeList"]).split()
        subprocess.run([str(HERE / "cluster.sh"), "kill-node", STATE, nodes[0 if first else -1]], check=True)
        return nodes[0 if first else -1]


class Jobs(Case):
    @classmethod
    def setUpClass(cls):
        cls.reference = None

    def config(self, name="run", **more):
        path = self.folder / f"{name}.cfg"
        settings = {"model__path": TINY, "prompts__path": PROMPTS, "prompts__limit": N, "policy__name": "fixed",
                    "policy__prefill": "max", "policy__level": "max", "decode__max_new_tokens": 240,
                    "decode__slots": 1, "decode__stop_at_eos": False, "backend__threads": 1,
                    "output__dir": self.folder / name}
        settings.update(more)
        write_config(path, **settings)
        return path

    def setUp(self):
        super().setUp()
        self.out = self.folder / "run"
        if Jobs.reference is None:  # one rank, no Slurm
            pmpd("run", self.config("local"))
            Jobs.reference = read_run(self.folder / "local")
            self.assertEqual(len(Jobs.reference), N)

    def tearDown(self):
        for job in slurm("squeue", "-h", "-o", "%i").split():
            slurm("scancel", job)
        end = time.time() + PATIENCE_S
        while slurm("squeue", "-h") and time.time() < end:
            time.sleep(0.1)
        super().tearDown()

    def check(self, job, starts=1):
        """The job has ended well after so many starts, and its run file is right."""
        facts = job.end()
        self.assertEqual((facts["JobState"], facts["ExitCode"]), ("COMPLETED", "0:0"), job.text())
        found = read_run(self.out)
        self.assertEqual(Jobs.reference.keys(), found.keys())
        for key, turn in Jobs.reference.items():
            self.assertEqual(turn["tokens"], found[key]["tokens"])
            np.testing.assert_array_equal(turn["logprob"], found[key]["logprob"])
        # no prompt was decoded twice to its end
        self.assertEqual(n_finished(self.out), N)
        if starts > 1:
            done = re.findall(r"resuming: (\d+) of", job.text())
            self.assertGreater(int(done[-1]), 0, job.text())
        return job.text()

    def test_srun(self):
        job = Job(self.folder, self.config())
        text = self.check(job)
        self.assertIn("2 ranks on 2 nodes", text)
        self.assertIn("srun --mpi=pmix", text)
        self.assertIn("run.deadline_s=3540", text)

    def test_mpirun(self):
        text = self.check(Job(self.folder, self.config(), PMPD_LAUNCH="mpirun"))
        self.assertIn("mpirun -n 2", text)

    def signalled(self, *options, **env):
        """What --signal=B:USR1@120 does before the time limit, done now."""
        job = Job(self.folder, self.config(), options, **env)
        job.middle(self.out)
        slurm("scancel", "--batch", "--signal=USR1", job.id)
        self.assertEqual(job.requeued()["Restarts"], "1")
        text = self.check(job, starts=2)
        self.assertIn("exit code 75; back into the queue", text)

    def test_signal_srun(self):
        self.signalled()

    def test_signal_mpirun(self):
        self.signalled(PMPD_LAUNCH="mpirun")

    def test_signal_to_the_ranks(self):
        """scancel --signal=USR1 without --batch: the ranks get it, the script does not. Restarts are bounded."""
        job = Job(self.folder, self.config(), PMPD_MAX_RESTARTS="1")
        job.middle(self.out)
        slurm("scancel", "--signal=USR1", job.id)
        job.requeued()
        before = n_finished(self.out)
        job.middle(self.out, before + 4)
        slurm("scancel", "--signal=USR1", job.id)
        facts = job.end()
        self.assertEqual((facts["JobState"], facts["ExitCode"]), ("FAILED", "75:0"), job.text())
        self.assertIn("not restarted after 1 restarts", job.text())

    def test_scancel_then_submit_again(self):
        config = self.config()
        job = Job(self.folder, config)
        job.middle(self.out)
        slurm("scancel", job.id)
        self.assertEqual(job.end()["JobState"], "CANCELLED", job.text())
        self.assertFalse((self.out / "run.h5").exists())
        self.check(Job(self.folder, config), starts=2)

    def test_requeue(self):
        job = Job(self.folder, self.config())
        job.middle(self.out)
        slurm("scontrol", "requeue", job.id)
        job.requeued()
        self.check(job, starts=2)

    def test_srun_without_pmix(self):
        """srun that starts N programs of one rank each: one clear message, no endless restarts."""
        job = Job(self.folder, self.config(), PMPD_LAUNCH="srun", SLURM_MPI_TYPE="none")
        facts = job.end()
        self.assertEqual((facts["JobState"], facts["ExitCode"]), ("FAILED", "2:0"), job.text())
        errors = [line for line in job.text().splitlines() if "error: srun started 2 tasks" in line]
        self.assertEqual(len(errors), 1, job.text())
        self.assertIn("srun --mpi=pmix", errors[0])
        self.assertFalse((self.out / "run.h5").exists())

    def test_two_jobs_one_directory(self):
        config = self.config()
        first = Job(self.folder, config)
        first.middle(self.out, 1)
        second = Job(self.folder, config)
        facts = second.end()
        self.assertEqual((facts["JobState"], facts["ExitCode"]), ("FAILED", "2:0"), second.text())
        self.assertRegex(second.text(), r"error: .*journal\.bin.*another")
        self.check(first)

    def node_killed(self, first):
        job = Job(self.folder, self.config())
        job.middle(self.out)
        dead = job.kill_node(first)
        job.requeued()
        self.check(job, starts=2)
        self.assertNotIn(dead, slurm("scontrol", "show", "hostnames", job.facts()["NodeList"]).split())

    def test_rank_killed(self):
        """As when a rank runs out of memory: the script itself puts the job back."""
        job = Job(self.folder, self.config(), PMPD_LAUNCH="mpirun")
        job.middle(self.out)
        os.kill(rank_processes(self.folder)[-1], signal.SIGKILL)
        job.requeued()
        self.assertRegex(self.check(job, starts=2), r"exit code \d+; back into the queue")

    # last, by name: each takes a node away for good
    def test_zz_first_node_killed(self):
        """The batch script dies with it: Slurm notices and requeues."""
        self.node_killed(True)

    def test_zz_other_node_killed(self):
        self.node_killed(False)


if __name__ == "__main__":
    main()

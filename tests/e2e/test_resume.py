"""kill -9 in the middle, then the same command: finished prompts are not decoded again, the run file
is complete and equals that of an uninterrupted run."""
import json
import os
import signal
import subprocess
import time

import h5py
import numpy as np

from common import TINY, TOP, Case, command, environment, main, pmpd, read_run, write_config

PROMPTS = TOP / "experiments" / "tasks" / "tiny_mixed.jsonl"
N = 12


class Resume(Case):
    def config(self, name, **more):
        path = self.folder / f"{name}.cfg"
        settings = {"model__path": TINY, "prompts__path": PROMPTS, "prompts__limit": N,
                    "decode__max_new_tokens": 60, "decode__slots": 2, "output__dir": self.folder / name,
                    "backend__threads": 1}
        settings.update(more)
        write_config(path, **settings)
        return path

    def kill_in_the_middle(self, config, ranks):
        """Starts a run and kills it when its journal shows some finished prompts."""
        journal = self.folder / "killed" / "journal.bin"
        run = subprocess.Popen(command("run", config, ranks=ranks), env=environment(), stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.time() + 120
        while time.time() < deadline and run.poll() is None:
            if journal.exists() and journal.stat().st_size > 6000:
                break
            time.sleep(0.01)
        self.assertIsNone(run.poll(), "the run ended before it could be killed")
        children = subprocess.run(["pgrep", "-f", str(config)], stdout=subprocess.PIPE).stdout.split()
        for pid in children:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
        run.wait(timeout=60)
        self.assertFalse((self.folder / "killed" / "run.h5").exists())

    def check(self, ranks):
        pmpd("run", self.config("whole"), ranks=ranks)
        config = self.config("killed")
        self.kill_in_the_middle(config, ranks)
        again = pmpd("run", config, ranks=ranks)
        message = next(s for s in again.stderr.decode().splitlines() if "resuming" in s)
        done = int(message.split("resuming: ")[1].split(" of ")[0])
        self.assertGreater(done, 0, message)
        self.assertLess(done, N, message)
        whole, resumed = read_run(self.folder / "whole"), read_run(self.folder / "killed")
        self.assertEqual(whole.keys(), resumed.keys())
        self.assertEqual(len(whole), N)
        for key in whole:
            self.assertEqual(whole[key]["tokens"], resumed[key]["tokens"])
            np.testing.assert_array_equal(whole[key]["logprob"], resumed[key]["logprob"])
        with h5py.File(self.folder / "killed" / "run.h5") as run:
            attempts = run["prompts"]["attempt"]
            epochs = {int(e) for e in run["passes"]["epoch"]}
            self.assertEqual(epochs, {0, 1})
            # a step's pass is a row of /passes of its own kind
            kinds = run["passes"]["kind"][run["steps"]["pass"]]
            self.assertEqual(set(kinds.tolist()), {1})
        self.assertTrue((attempts >= 1).all())
        answers = [json.loads(s) for s in (self.folder / "killed" / "answers.jsonl").read_text().splitlines()]
        self.assertEqual(len(answers), N)
        # a third start has nothing left to do
        third = pmpd("run", config, ranks=ranks)
        self.assertIn(f"{N} of {N} prompts are done, 0 left", third.stderr.decode())

    def test_one_rank(self):
        self.check(0)

    def test_two_replicas(self):
        self.check(2)

    def test_other_settings_are_not_mixed(self):
        """A changed plan decodes again; threads and replicas do not matter."""
        pmpd("run", self.config("whole", prompts__limit=3))
        same = pmpd("run", self.config("whole", prompts__limit=3, backend__threads=2), ranks=2)
        self.assertIn("3 of 3 prompts are done", same.stderr.decode())
        other = pmpd("run", self.config("whole", prompts__limit=3, decode__temperature=0.5))
        self.assertIn("0 of 3 prompts are done, 3 left", other.stderr.decode())
        self.assertIn("3 finished prompts of other settings", other.stderr.decode())


if __name__ == "__main__":
    main()

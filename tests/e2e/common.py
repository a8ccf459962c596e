"""What the end-to-end tests share: running pmpd (alone or under mpirun), reading run files."""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

import h5py
import numpy as np

TOP = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("PMPD_BUILD", TOP / "build"))
PMPD = str(BUILD / "pmpd")
TINY = TOP / "experiments" / "tiny"
DATA = os.environ.get("PMPD_TEST_DATA")  # models trained elsewhere; tests that need it skip without
STORIES = pathlib.Path(DATA) / "stories260k" if DATA else None


def environment():
    """Open MPI on one machine, also as root and with more ranks than cores."""
    env = dict(os.environ)
    env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
               OMPI_MCA_rmaps_base_oversubscribe="1", OMPI_MCA_hwloc_base_binding_policy="none",
               OMPI_MCA_mpi_yield_when_idle="1", OMPI_MCA_btl_vader_single_copy_mechanism="none")
    return env


def command(*args, ranks=0):
    mpirun = ["mpirun", "-n", str(ranks)] if ranks else []
    return mpirun + [PMPD] + [str(a) for a in args]


def pmpd(*args, ranks=0, ok=True, timeout=300):
    """Runs pmpd; returns the finished process. ok: it must succeed."""
    done = subprocess.run(command(*args, ranks=ranks), env=environment(), timeout=timeout,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if ok and done.returncode != 0:
        raise AssertionError(f"pmpd {' '.join(map(str, args))}: exit {done.returncode}\n"
                             f"{done.stderr.decode(errors='replace')}")
    return done


def result(*args, **kwargs):
    """The JSON that a subcommand prints."""
    return json.loads(pmpd(*args, "--json", **kwargs).stdout)


def logits(model, ids, *args, ranks=0):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "logits.npy"
        pmpd("logits", model, "--ids", ",".join(map(str, ids)), "--out", out, *args, ranks=ranks)
        return np.load(out)


# How far logits of nested weights may be from the definition, as nmse: cpu_ref is exact; cpu rounds the
# activations of every product to 8 bits: up to one percent each in these narrow models, squared, times the
# fifteen products or so that a logit has gone through. One plane too few is a hundred times that.
NESTED_NMSE = {"cpu_ref": 1e-9, "cpu": 2e-3}


def nmse(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return ((a - b) ** 2).sum() / (b ** 2).sum()


def write_config(path, **settings):
    """A configuration file; keys with __ for the dot."""
    groups = {}
    for key, value in settings.items():
        group, name = key.split("__", 1)
        text = json.dumps(str(value) if isinstance(value, pathlib.Path) else value)
        groups.setdefault(group, []).append(f"  {name} = {text};")
    pathlib.Path(path).write_text("".join(f"{g}: {{\n" + "\n".join(v) + "\n};\n" for g, v in groups.items()))


def read_run(directory):
    """{(prompt, turn): tokens and records} of a run file, in a form that two runs can be compared in."""
    with h5py.File(pathlib.Path(directory) / "run.h5", "r") as run:
        prompts, steps = run["prompts"][:], run["steps"][:]
    out = {}
    for p in prompts:
        mine = steps[(steps["prompt"] == p["prompt"]) & (steps["turn"] == p["turn"])]
        mine = mine[np.argsort(mine["step"])]
        out[int(p["prompt"]), int(p["turn"])] = {
            "tokens": [int(p["token0"])] + [int(t) for t in mine["token"]],
            "levels": [int(v) for v in mine["level"]],
            "logprob": np.concatenate([[p["logprob0"]], mine["logprob"]]).astype(np.float64),
            "entropy": np.concatenate([[p["entropy0"]], mine["entropy"]]).astype(np.float64),
        }
    return out


class Case(unittest.TestCase):
    """A test with a temporary folder of its own."""

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="pmpd-e2e-"))

    def tearDown(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def main():
    """Exit code 77 when everything was skipped."""
    program = unittest.main(exit=False, verbosity=2)
    r = program.result
    if not r.wasSuccessful():
        sys.exit(1)
    sys.exit(77 if r.testsRun and len(r.skipped) == r.testsRun else 0)

#!/usr/bin/env python3
"""What looking costs: the processor time of a decode step with more and more signals, and with probes.

usage: signals_cost.py PMPD MODEL PROMPTS.jsonl [--high 4] [--low 3] [--tokens 200] [--rounds 5] [--instructions]
                       [--set key=value]...

Every round runs each case once, one after the other, on one thread; all decode every step at the high level, one
sequence at a time. A step's time is the processor time (user and system) of a run less that of a run of one token,
by the number of steps; the smallest over the rounds is printed. Processor time bears a load beside it better than
the clock does, and instructions (--instructions: under valgrind, which needs short prompts, --tokens 40 and
--rounds 1) bear any; they count memory that is waited for as nothing. "probes" is held against the same product
without probes.
"""
import argparse
import pathlib
import re
import resource
import shutil
import subprocess
import tempfile

import h5py

CASES = {  # name: settings, what it is held against
    "nothing": ("policy.name=fixed", None),
    "default set": ("policy.name=confidence policy.dial=1", "nothing"),
    "hidden, K and V": ("policy.name=fixed output.signals=true", "nothing"),
    "activations": ("policy.name=activation policy.dial=1", "nothing"),
    "no probes": ("policy.name=error-feedback policy.dial=1", None),
    "probes, 1 in 8": ("policy.name=error-feedback policy.divergence=0 policy.every=8", "no probes"),
    "probes, all": ("policy.name=error-feedback policy.divergence=0 policy.every=1", "no probes"),
}


def run(args, folder, settings, n_tokens):
    """Processor seconds (or 1e9 instructions) of a run, and its decode steps."""
    out, empty = folder / "run", folder / "empty.cfg"
    shutil.rmtree(out, ignore_errors=True)
    empty.write_text("")
    sets = [f"model.path={args.model}", f"prompts.path={args.prompts}", f"output.dir={out}", "log.level=error",
            f"policy.level={args.high}", f"policy.prefill={args.high}", f"policy.levels={args.high} {args.low}",
            "decode.stop_at_eos=false", f"decode.max_new_tokens={n_tokens}", "backend.threads=1", *settings.split(),
            *args.set]
    tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder / 'callgrind'}"] if args.instructions else []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*tool, args.pmpd, "run", empty, *(word for s in sets for word in ("--set", s))], check=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if args.instructions:
        cost = 1e-9 * int(re.search(r"Collected : (\d+)", done.stderr).group(1))
    with h5py.File(out / "run.h5", "r") as file:
        levels = file["steps"]["level"]
    if len(set(levels)) > 1:
        raise SystemExit(f"{settings}: steps ran at {len(set(levels))} levels, expected one")
    return cost, len(levels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pmpd")
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--high", default="4")
    parser.add_argument("--low", default="3")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    whole, start = {name: [] for name in CASES}, {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, (settings, _) in CASES.items():
                whole[name].append(run(args, pathlib.Path(folder), settings, args.tokens))
                start[name].append(run(args, pathlib.Path(folder), settings, 1))
    step_ms = {name: 1e3 * (min(whole[name])[0] - min(start[name])[0]) / whole[name][0][1] for name in CASES}
    print(f"{'looking at':<18}{'1e6 instr' if args.instructions else 'ms/step':>10}{'cost %':>9}")
    for name, (_, base) in CASES.items():
        cost = f"{100 * (step_ms[name] / step_ms[base] - 1):>9.2f}" if base else f"{'':>9}"
        print(f"{name:<18}{step_ms[name]:>10.4f}{cost}")


if __name__ == "__main__":
    main()

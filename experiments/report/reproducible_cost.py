#!/usr/bin/env python3
"""What parallel.reproducible costs: decode and prefill speed with it off and on, interleaved.

usage: reproducible_cost.py PMPD MODEL PROMPTS.jsonl [--tensor 1,2] [--segments 2,8] [--rounds 5]
                            [--set key=value]...

Every round runs each case once, one after the other, so that a load that comes and goes meets all of them.
Printed per case: the median speed, and the median over the rounds of its ratio to the same number of tensor
ranks without parallel.reproducible, with the smallest and the largest. Ranks get one thread each unless
--set says otherwise; more ranks than idle cores measure the scheduler.
"""
import argparse
import pathlib
import statistics
import subprocess
import tempfile

import h5py


def speeds(args, folder, tensor, segments):
    """Decode and prefill tokens per second of one run, from the time of its passes."""
    out = folder / "run"
    sets = ["model.path=" + args.model, "prompts.path=" + args.prompts, f"output.dir={out}", "backend.threads=1",
            f"parallel.tensor_ranks={tensor}", "log.level=error", *args.set]
    if segments:
        sets += ["parallel.reproducible=true", f"parallel.segments={segments}"]
    empty = folder / "empty.cfg"
    empty.write_text("")
    subprocess.run(["rm", "-rf", out], check=True)
    command = [args.pmpd, "run", empty] + [word for s in sets for word in ("--set", s)]
    subprocess.run((["mpirun", "-n", str(tensor)] if tensor > 1 else []) + command, check=True,
                   stdout=subprocess.DEVNULL)
    with h5py.File(out / "run.h5", "r") as run:
        passes = run["passes"][:]
    found = []
    for kind in (1, 0):
        mine = passes[passes["kind"] == kind]
        found.append(mine["n_tok"].sum() / (1e-6 * mine["time_us"].sum()))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pmpd")
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--tensor", default="1,2")
    parser.add_argument("--segments", default="2,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    cases = [(int(t), int(s)) for t in args.tensor.split(",") for s in ["0", *args.segments.split(",")]]
    measured = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for case in cases:
                measured[case].append(speeds(args, pathlib.Path(folder), *case))
    print(f"{'tensor ranks':>12} {'segments':>8}   {'decode tok/s, ratio to off':>34}   {'prefill tok/s, ratio to off':>34}")
    for tensor, segments in cases:
        cells = []
        for which in (0, 1):
            mine = [m[which] for m in measured[tensor, segments]]
            ratios = [m / o[which] for m, o in zip(mine, measured[tensor, 0])]
            cells.append(f"{statistics.median(mine):12.0f}  {statistics.median(ratios):.3f} "
                         f"({min(ratios):.3f} to {max(ratios):.3f})")
        print(f"{tensor:12d} {segments or 'off':>8}   {cells[0]:>34}   {cells[1]:>34}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What experiments/study.sh needs: prompt files, the choice of a dial, and the table of all policies.

usage: study.py prompts SPLIT N OUT.jsonl TASKS.jsonl...
       study.py dial --bits B [--nearest] FOLDER
       study.py table --tasks TASKS.jsonl --bits B --out FOLDER --curve STATIC_RUN... --runs RUN...

A RUN is a directory of `pmpd run` (run.h5, answers.jsonl). The score of a prompt is the share of its known facts that
the answer holds. Intervals are 95 % bootstrap intervals of the mean over prompts. "against static" is the mean
difference, prompt by prompt, to static schedules of the same average bits: between the two runs of --curve whose bits
lie on either side, scores are interpolated linearly. Table writes table.txt, table.csv, bits.svg and study.h5.
SPDX-License-Identifier: Apache-2.0
"""
import argparse
import contextlib
import csv
import itertools
import json
import pathlib
import sys

import h5py
import numpy as np

RESAMPLES, SEED = 4000, 0
NEAR = 0.05  # average bits within which a budget counts as held
FARTHEST = 9  # logit of a dial: what most policies add up with
EDGES = (1, 21, 41, 81, 121)  # first step below the prefill level: 0, 1-20, 21-40, 41-80, 81-120, later, never
BINS = ("0", "1-20", "21-40", "41-80", "81-120", "later", "never")


def read_jsonl(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_prompts(split, n, out, files):
    """The tasks' prompts in turn, the first n."""
    tasks = [[row for row in read_jsonl(file) if row["split"] == split] for file in files]
    rows = [row for turn in itertools.zip_longest(*tasks) for row in turn if row]
    if len(rows) < n:
        sys.exit(f"{n} prompts of split {split} wanted, the files have {len(rows)}")
    with open(out, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[:n])


def interval(values):
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(SEED)
    means = np.asarray(values)[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    return np.quantile(means, (.025, .975))


class Run:
    def __init__(self, directory, tasks):
        self.path = pathlib.Path(directory)
        self.name = self.path.name
        answers = {str(a["question_id"]): a["choices"][0]["turns"][0] for a in read_jsonl(self.path / "answers.jsonl")}
        missing = [row["id"] for row in tasks if row["id"] not in answers]
        if missing:
            sys.exit(f"{self.path}: {len(missing)} prompts have no answer, first {missing[0]}; did some fail?")
        self.score = np.array([100 * np.mean([f in answers[row["id"]] for f in row["facts"]]) for row in tasks])
        with h5py.File(self.path / "run.h5") as run:
            self.metric = {name: value[()] for name, value in run["metrics"].items()}
            place = {row["id"]: i for i, row in enumerate(tasks)}
            prompts = {int(p["prompt"]): (place[p["id"].decode()], float(p["prefill_avg_bits"]))
                       for p in run["prompts"][:]}
            steps = np.sort(run["steps"][:], order=["prompt", "turn", "step"])
        self.n_steps = len(steps)
        self.bits = float(self.metric["avg_decode_bits"])
        self.first_low = np.full(len(tasks), -1)  # first step below the prefill level; -1: none
        self.changes = np.zeros(len(tasks), int)
        self.prompt_bits = np.full(len(tasks), np.nan)
        for p, (i, prefill) in prompts.items():
            bits = steps["avg_bits"][steps["prompt"] == p]
            low = np.flatnonzero(bits < prefill - 1e-6)
            self.first_low[i] = low[0] if len(low) else -1
            self.changes[i] = np.count_nonzero(np.diff(np.concatenate(([prefill], bits))))
            self.prompt_bits[i] = bits.mean() if len(bits) else np.nan

    def histogram(self):
        never = self.first_low < 0
        return [*np.bincount(np.digitize(self.first_low[~never], EDGES), minlength=len(BINS) - 1), never.sum()]


def logit(d):
    return float(np.log(d / (1 - d)))


def dial(folder, bits, nearest):
    """The next dial to try, by bisection of its logit and then on the line between the two next to the average bits; or
    the one tried that came nearest. The runs in folder are named after their dials; more dial buys more bits."""
    tried = {}
    for file in folder.glob("*/run.h5"):
        with h5py.File(file) as run:
            tried[float(file.parent.name)] = float(run["metrics/avg_decode_bits"][()])
    if nearest:
        return min(tried, key=lambda d: abs(tried[d] - bits))
    low = max(((logit(d), b) for d, b in tried.items() if b <= bits), default=(-FARTHEST, None))
    high = min(((logit(d), b) for d, b in tried.items() if b > bits and logit(d) > low[0]), default=(FARTHEST, None))
    part = .5 if None in low + high else np.clip((bits - low[1]) / (high[1] - low[1]), .1, .9)
    return 1 / (1 + np.exp(-(low[0] + part * (high[0] - low[0]))))


def static_at(curve, bits):
    """Scores (prompts) of static schedules at these average bits; None outside the curve."""
    curve = sorted(curve, key=lambda r: r.bits)
    if not curve[0].bits <= bits <= curve[-1].bits:
        return None
    hi = next(i for i, r in enumerate(curve) if r.bits >= bits)
    a, b = curve[max(hi - 1, 0)], curve[hi]
    w = (bits - a.bits) / (b.bits - a.bits) if b.bits > a.bits else 1.0
    return (1 - w) * a.score + w * b.score


def difference(scores, other):
    """(mean, low, high) of the paired difference; NaN without other."""
    if other is None:
        return (np.nan,) * 3
    return ((scores - other).mean(), *interval(scores - other))


FIELDS = ("score", "low", "high", "prefill_bits", "decode_bits", "steps", "bytes_per_token", "tok_s",
          "against_static", "against_low", "against_high", "changes")


def figures(run, curve):
    m = run.metric
    return (run.score.mean(), *interval(run.score), m["avg_prefill_bits"], run.bits, run.n_steps / len(run.score),
            m["bytes_per_token"], m["decode_tok_s"], *difference(run.score, static_at(curve, run.bits)),
            run.changes.mean())


def spread(mean, low, high):
    return "-" if np.isnan(mean) else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def print_table(rows, runs, n):
    print(f"{n} test prompts; score in percent of known facts, with 95 % intervals; decode bits are those of an average "
          "step\nand steps those of a prompt: where bad answers run on, more steps share the bits")
    print(f"{'run':<23}{'score':>6} {'interval':<14}{'prefill':>8}{'decode':>7}{'steps':>7}{'bytes/tok':>10}{'tok/s':>7}  "
          "against static of the same decode bits")
    for name, row in rows.items():
        r = dict(zip(FIELDS, row))
        print(f"{name:<23}{r['score']:>6.1f} {'[%.1f, %.1f]' % (r['low'], r['high']):<14}{r['prefill_bits']:>8.2f}"
              f"{r['decode_bits']:>7.3f}{r['steps']:>7.1f}{r['bytes_per_token']:>10.0f}{r['tok_s']:>7.0f}  "
              f"{spread(r['against_static'], r['against_low'], r['against_high'])}")
    print("\nprompts by the first step below the level of prefill, and level changes per prompt")
    print(f"{'run':<23}" + "".join(f"{b:>8}" for b in BINS) + f"{'changes':>9}")
    for run in runs:
        print(f"{run.name:<23}" + "".join(f"{k:>8}" for k in run.histogram()) + f"{run.changes.mean():>9.2f}")


def print_verdict(runs, curve, bits):
    named = {r.name: r for r in runs}
    print(f"\nbudget of {bits} bits: average, and score against static and alternate")
    for run in runs:
        if run.budgeted:
            held = "held" if abs(run.bits - bits) <= NEAR else "NOT held"
            sides = [f"{other} {spread(*difference(run.score, named[other].score))}"
                     for other in ("static", "alternate") if other in named]
            print(f"{run.name:<23}{run.bits:.3f} {held:<9}" + "  ".join(sides))
    against = {r.name: difference(r.score, static_at(curve, r.bits)) for r in runs if not r.name.startswith("oracle")}
    winners = [name for name, d in sorted(against.items(), key=lambda x: -np.nan_to_num(x[1][0])) if d[1] > 0]
    losers = [name for name, d in against.items() if d[2] < 0]
    print("\nbetter than static at the same bits (interval above 0; the oracles have seen the scores and do not count): "
          + (", ".join(winners) or "none"))
    print("worse: " + (", ".join(losers) or "none"))


def plot(path, runs, curve, bits):
    """Score against average decode bits, as SVG: static schedules as a line, the other runs as points, those
    under a budget aside."""
    shown = [r for r in runs if r.bits <= 4.01 and not r.budgeted]

    def at(r):
        return f"{60 + 270 * (r.bits - 1.9):.0f}", f"{470 - 4.3 * r.score.mean():.0f}"
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="780" height="520" font-family="sans-serif" font-size="11">',
           '<rect width="780" height="520" fill="white"/>']
    for b in (2, 2.5, 3, 3.5, 4):
        out.append(f'<text x="{60 + 270 * (b - 1.9):.0f}" y="490" text-anchor="middle">{b}</text>')
    for s in range(0, 101, 20):
        y = 470 - 4.3 * s
        out.append(f'<text x="40" y="{y + 4:.0f}" text-anchor="end">{s}</text>'
                   f'<path d="M50 {y:.0f}H700" stroke="#ddd"/>')
    line = " ".join(",".join(at(r)) for r in sorted(curve, key=lambda r: r.bits))
    out.append(f'<polyline points="{line}" fill="none" stroke="#888"/>')
    for r in shown:
        x, y = at(r)
        low, high = (f"{470 - 4.3 * v:.0f}" for v in interval(r.score))
        out.append(f'<path d="M{x} {low}V{high}" stroke="#6ad"/><circle cx="{x}" cy="{y}" r="3" fill="#036"/>'
                   f'<text x="{int(x) + 6}" y="{int(y) + 4}">{r.name}</text>')
    out.append(f'<text x="375" y="512" text-anchor="middle">average decode bits (line: static; budget {bits})</text>'
               '<text x="50" y="24">score, % of known facts</text></svg>')
    path.write_text("\n".join(out) + "\n")


def write_h5(path, rows, runs, tasks):
    """All runs in one file: the table, and per run its provenance, settings, metrics and what every prompt came to."""
    with h5py.File(path, "w") as out:
        out.attrs["description"] = "experiments/study.sh: policies beside each other on the same prompts"
        table = np.array([(name.encode(), *row) for name, row in rows.items()],
                         dtype=[("run", "S32"), *((field, "f8") for field in FIELDS)])
        out.create_dataset("table", data=table).attrs["description"] = \
            "score, low, high, against_*: percent of facts; bits; decode steps and level changes per prompt; bytes; tokens/s"
        out["prompt_id"] = [row["id"] for row in tasks]
        out["task"] = [row["task"] for row in tasks]
        for run in runs:
            group = out.create_group(f"runs/{run.name}")
            with h5py.File(run.path / "run.h5") as source:
                for name in ("provenance", "metrics", "levels", "plans", "plan_switches", "budget"):
                    source.copy(name, group)
            for name, values, unit in (("score", run.score, "percent of facts"), ("bits", run.prompt_bits, "bits"),
                                       ("first_low", run.first_low, "step; -1: never"),
                                       ("changes", run.changes, "level changes"),
                                       ("histogram", run.histogram(), "prompts: " + ", ".join(BINS))):
                group.create_dataset(name, data=values).attrs["unit"] = unit


def make_table(args):
    tasks = read_jsonl(args.tasks)
    curve = [Run(d, tasks) for d in args.curve]
    runs = [Run(d, tasks) for d in args.runs]
    for run in runs:
        with h5py.File(run.path / "run.h5") as f:
            run.budgeted = len(f["budget"]) > 0
    rows = {run.name: figures(run, curve) for run in runs}
    with open(args.out / "table.txt", "w", encoding="utf-8") as text, contextlib.redirect_stdout(text):
        print_table(rows, runs, len(tasks))
        print_verdict(runs, curve, args.bits)
    print((args.out / "table.txt").read_text(), end="")
    with open(args.out / "table.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("run", *FIELDS), *((name, *row) for name, row in rows.items())])
    plot(args.out / "bits.svg", runs, curve, args.bits)
    extra = [r for r in curve if r.name not in rows]
    write_h5(args.out / "study.h5", rows, runs + extra, tasks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    p = sub.add_parser("prompts", help="a prompt file of all tasks in turn")
    p.add_argument("split")
    p.add_argument("n", type=int)
    p.add_argument("out")
    p.add_argument("files", nargs="+")
    p = sub.add_parser("dial", help="the next dial to try, or the one nearest to the average bits")
    p.add_argument("--bits", type=float, required=True)
    p.add_argument("--nearest", action="store_true")
    p.add_argument("folder", type=pathlib.Path)
    p = sub.add_parser("table", help="the table of all policies")
    p.add_argument("--tasks", required=True)
    p.add_argument("--bits", type=float, required=True)
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("--curve", nargs="+", required=True)
    p.add_argument("--runs", nargs="+", required=True)
    args = parser.parse_args()
    if args.what == "prompts":
        write_prompts(args.split, args.n, args.out, args.files)
    elif args.what == "dial":
        print(f"{dial(args.folder, args.bits, args.nearest):.6f}")
    else:
        make_table(args)


if __name__ == "__main__":
    main()

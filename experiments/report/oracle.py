#!/usr/bin/env python3
"""The plan of each prompt that turned out best among some runs, as the oracle policy reads it.

usage: oracle.py --tasks TASKS.jsonl [--bits B] OUT.jsonl RUN_DIRECTORY...

Runs of one prompt file that differ in their switch points (policy.name=static), say. Best is the largest share
of a prompt's known facts in the answer (the score of compare.py), then the fewest decode bits, then the run named
first. With --bits it is the choice with the best mean score at not more than B decode bits on average: each prompt
takes the largest score - price * (bits - B) * steps, at the lowest price that keeps to B. Since it has seen the scores, the oracle is an upper bound for what chooses among these plans, not a policy.
"""
import argparse
import json
import pathlib

import h5py

from compare import read_tasks


def plans(directory):
    """{prompt id: (average decode bits, decode steps, plan)} of a run as it was carried out, first turns."""
    with h5py.File(directory / "run.h5", "r") as run:
        levels = [text.decode() for text in run["levels"]["text"]]
        ids = {int(p["prompt"]): p["id"].decode() for p in run["prompts"][:]}
        steps, switches = run["steps"][:], run["plan_switches"][:]
        rows = [row for row in run["plans"][:] if row["turn"] == 0]
    out = {}
    for row in rows:
        bits = steps["avg_bits"][(steps["prompt"] == row["prompt"]) & (steps["turn"] == 0)]
        points = switches[row["first_switch"]:row["first_switch"] + row["n_switches"]]
        prefill = levels[row["prefill_level"]]
        words = [f"{s['step']}:{levels[s['level']]}" for s in points] or [f"0:{prefill}"]
        out[ids[int(row["prompt"])]] = (float(bits.mean()) if len(bits) else 0.0, len(bits),
                                        " ".join([f"prefill:{prefill}", *words]))
    return out


def scores(directory, tasks):
    """{prompt id: share of its facts found}."""
    with open(directory / "answers.jsonl", encoding="utf-8") as lines:
        answers = {str(a["question_id"]): a["choices"][0]["turns"][0] for a in map(json.loads, lines)}
    return {i: sum(fact in text for fact in tasks[i]["facts"]) / len(tasks[i]["facts"]) for i, text in answers.items()}


def choose(options, price, bits):
    """The best of each prompt's options (score, bits, steps, plan), and the average bits of all of them."""
    best = {p: max(rows, key=lambda r: (r[0] - price * (r[1] - bits) * r[2], -r[1])) for p, rows in options.items()}
    spent, steps = sum(r[1] * r[2] for r in best.values()), sum(r[2] for r in best.values())
    return best, spent / max(steps, 1)


def within(options, bits):
    """The choice at the lowest price that keeps to the average bits, by bisection."""
    low, high = 0.0, 1.0
    if choose(options, low, bits)[1] <= bits:
        return choose(options, low, bits)[0]
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if choose(options, middle, bits)[1] <= bits else (middle, high)
    return choose(options, high, bits)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", required=True, help="the prompts with their facts (JSONL)")
    parser.add_argument("--bits", type=float, help="average decode bits to keep to (default: as many as help)")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN_DIRECTORY")
    args = parser.parse_args()
    tasks, options = read_tasks(args.tasks), {}
    for directory in args.runs:
        score = scores(directory, tasks)
        for prompt, row in plans(directory).items():
            options.setdefault(prompt, []).append((score[prompt], *row))
    best = within(options, args.bits) if args.bits else choose(options, 0, 0)[0]
    with open(args.out, "w", encoding="utf-8") as out:
        for prompt, (*_, plan) in best.items():
            out.write(json.dumps({"id": prompt, "turn": 0, "plan": plan}) + "\n")
    print(f"{args.out}: plans of {len(best)} prompts from {len(args.runs)} runs")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The plan of each prompt that turned out best among some runs, as the oracle policy reads it.

usage: oracle.py --tasks TASKS.jsonl OUT.jsonl RUN_DIRECTORY...

Runs of one prompt file that differ in their switch points (policy.name=static), say. Best is the largest share
of a prompt's known facts in the answer (the score of compare.py), then the fewest decode bits, then the run named
first. Since it has seen the scores, the oracle is an upper bound for what chooses among these plans, not a policy.
"""
import argparse
import json
import pathlib

import h5py

from compare import read_tasks


def plans(directory):
    """{prompt id: (average decode bits, plan)} of a run as it was carried out, first turns."""
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
        out[ids[int(row["prompt"])]] = (float(bits.mean()) if len(bits) else 0.0,
                                        " ".join([f"prefill:{prefill}", *words]))
    return out


def scores(directory, tasks):
    """{prompt id: share of its facts found}."""
    with open(directory / "answers.jsonl", encoding="utf-8") as lines:
        answers = {str(a["question_id"]): a["choices"][0]["turns"][0] for a in map(json.loads, lines)}
    return {i: sum(fact in text for fact in tasks[i]["facts"]) / len(tasks[i]["facts"]) for i, text in answers.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", required=True, help="the prompts with their facts (JSONL)")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN_DIRECTORY")
    args = parser.parse_args()
    tasks, best = read_tasks(args.tasks), {}
    for directory in args.runs:
        score = scores(directory, tasks)
        for prompt, (bits, plan) in plans(directory).items():
            value = (score[prompt], -bits)
            if prompt not in best or value > best[prompt][0]:
                best[prompt] = (value, plan)
    with open(args.out, "w", encoding="utf-8") as out:
        for prompt, (_, plan) in best.items():
            out.write(json.dumps({"id": prompt, "turn": 0, "plan": plan}) + "\n")
    print(f"{args.out}: plans of {len(best)} prompts from {len(args.runs)} runs")


if __name__ == "__main__":
    main()

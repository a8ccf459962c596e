#!/usr/bin/env python3
"""One row per run: score, average decode bits, prefill bits, tokens/s, bytes per token.

usage: compare.py --tasks TASKS.jsonl NAME=RUN_DIRECTORY ...

A run directory is what `pmpd run` writes (run.h5, answers.jsonl). The score is the mean share of a
prompt's known facts that its answer holds, in percent.
"""
import argparse
import json
import pathlib

import h5py


def read_tasks(path):
    with open(path, encoding="utf-8") as lines:
        return {p["id"]: p for p in map(json.loads, lines)}


def score(answers, tasks):
    """Mean share of facts found, in percent."""
    shares = []
    with open(answers, encoding="utf-8") as lines:
        for answer in map(json.loads, lines):
            facts = tasks[str(answer["question_id"])]["facts"]
            text = answer["choices"][0]["turns"][0]
            shares.append(sum(fact in text for fact in facts) / len(facts))
    return 100 * sum(shares) / len(shares)


def row(directory, tasks):
    directory = pathlib.Path(directory)
    with h5py.File(directory / "run.h5", "r") as run:
        metric = {name: float(value[()]) for name, value in run["metrics"].items()}
    return [score(directory / "answers.jsonl", tasks), metric["avg_decode_bits"],
            metric["avg_prefill_bits"], metric["decode_tok_s"], metric["bytes_per_token"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", required=True, help="the prompts with their facts (JSONL)")
    parser.add_argument("runs", nargs="+", metavar="NAME=DIRECTORY")
    args = parser.parse_args()
    tasks = read_tasks(args.tasks)
    head = ("run", "score %", "decode bits", "prefill bits", "tokens/s", "bytes/token")
    print(f"{head[0]:<14}{head[1]:>9}{head[2]:>13}{head[3]:>14}{head[4]:>11}{head[5]:>14}")
    for run in args.runs:
        name, directory = run.split("=", 1)
        s, decode, prefill, speed, size = row(directory, tasks)
        print(f"{name:<14}{s:>9.1f}{decode:>13.2f}{prefill:>14.2f}{speed:>11.1f}{size:>14.0f}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Score answers against the facts of a task file.

    score_facts.py answers.jsonl tasks.jsonl [more tasks.jsonl ...] [--json]

An answer line has `question_id` and `choices[0].turns[0]`, a task line `id`, `task`, `facts` and
`reference`. Printed per task and over all: the share of a prompt's facts that occur in its answer
as substrings, in percent, mean over the prompts with a 95% bootstrap interval over the prompts;
the share of answers equal to the reference (spaces at both ends aside); the number of prompts.
Task lines without an answer are left out, answers without a task line are an error.
"""
import argparse
import json
import random
import sys

RESAMPLES, SEED = 2000, 0


def read_jsonl(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def interval(values):
    """95% bootstrap interval of the mean: (low, high)."""
    rng = random.Random(SEED)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values)
                   for _ in range(RESAMPLES))
    return means[int(.025 * RESAMPLES)], means[int(.975 * RESAMPLES) - 1]


def summarise(scores):
    """scores: list of (share of facts, exact) of one group of prompts."""
    facts = [100 * share for share, _ in scores]
    low, high = interval(facts)
    return dict(n=len(scores), facts=sum(facts) / len(facts), facts_low=low, facts_high=high,
                exact=100 * sum(exact for _, exact in scores) / len(scores))


def score(answers, tasks):
    """Task name (and 'all') -> figures; answers: id -> text."""
    groups = {}
    for row in tasks:
        if row["id"] not in answers:
            continue
        text = answers[row["id"]]
        share = sum(fact in text for fact in row["facts"]) / len(row["facts"])
        exact = text.strip() == row["reference"].strip()
        groups.setdefault(row["task"], []).append((share, exact))
    result = {task: summarise(scores) for task, scores in groups.items()}
    result["all"] = summarise([one for scores in groups.values() for one in scores])
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", help="answers.jsonl")
    parser.add_argument("tasks", nargs="+", help="task files, for instance tiny_story.jsonl")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    answers = {row["question_id"]: row["choices"][0]["turns"][0]
               for row in read_jsonl(arguments.answers)}
    tasks = [row for path in arguments.tasks for row in read_jsonl(path)]
    known = {row["id"] for row in tasks}
    unknown = [name for name in answers if name not in known]
    if unknown or not answers:
        sys.exit(f"{arguments.answers}: " + (
            f"{len(unknown)} answers are in no task file given, first {unknown[0]!r}"
            if unknown else "no answers"))
    result = score(answers, tasks)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{'task':12s} {'n':>4s} {'facts %':>8s} {'95% interval':>16s} {'exact %':>8s}")
    for task, row in result.items():
        spread = f"[{row['facts_low']:.1f}, {row['facts_high']:.1f}]"
        print(f"{task:12s} {row['n']:4d} {row['facts']:8.1f} {spread:>16s} {row['exact']:8.1f}")


if __name__ == "__main__":
    main()

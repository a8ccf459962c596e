#!/usr/bin/env python3
"""Prompts of the embedded model's three tasks to learn a scheduler from: none is in a held-out split,
the perplexity text or the calibration text. The same N gives the same file; a larger N begins with it.
usage: write_prompts.py N OUT.jsonl
SPDX-License-Identifier: Apache-2.0
"""
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tiny" / "train"))
from documents import SPLIT_SIZES, TASKS, calibration_text, perplexity_text, split, text  # noqa: E402


def main(n, out):
    known = {document.prompt for name in SPLIT_SIZES for task in TASKS for document in split(name, task)}
    known |= {document.prompt for document in perplexity_text() + calibration_text()}
    with open(out, "w") as file:
        for i, document in enumerate(text("learn", n, known)):
            task = list(TASKS)[i % len(TASKS)]
            file.write(json.dumps(dict(id=f"{task}-learn-{i:05d}", task=task, split="learn", turns=[document.prompt],
                                       reference=document.answer)) + "\n")


if len(sys.argv) != 3:
    sys.exit(__doc__)
main(int(sys.argv[1]), sys.argv[2])

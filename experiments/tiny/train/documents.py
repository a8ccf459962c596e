"""Which documents exist: the held-out splits, and the stream of training documents.

Every split is drawn from its own seed. As two seeds can still give the same text, the prompts of
all held-out documents are kept as hashes, and the training stream drops what matches.
"""
import hashlib
import random

import dialogue
import language
import story
from drills import DRILLS

TASKS = {"summary": dialogue.make, "translation": language.make, "story": story.make}
TASK_SHARES = {"summary": .38, "translation": .26, "story": .36}  # of the training documents
SPLIT_SIZES = {"validation": 60, "test": 100}  # per task
TEXT_SIZE = 120  # documents of the perplexity text
CALIBRATION_SIZE = 150  # documents of the quantiser's calibration text


def prompt_hash(prompt):
    return hashlib.sha256(prompt.encode()).digest()


def split(name, task):
    """The documents of one task of 'validation' or 'test', all different."""
    documents, seen, number = [], set(), 0
    while len(documents) < SPLIT_SIZES[name]:
        document = TASKS[task](random.Random(f"{name} {task} {number}"))
        number += 1
        if document.prompt not in seen:
            seen.add(document.prompt)
            documents.append(document)
    return documents


def text(seed, size, known):
    """Documents of the three tasks in turn, none of which has a prompt in `known`."""
    known, documents, number = set(known), [], 0
    while len(documents) < size:
        task = list(TASKS)[len(documents) % len(TASKS)]
        document = TASKS[task](random.Random(f"{seed} {number}"))
        number += 1
        if document.prompt not in known:
            known.add(document.prompt)
            documents.append(document)
    return documents


def perplexity_text():
    """None of it is in the test split."""
    return text("text", TEXT_SIZE, {document.prompt for task in TASKS for document in split("test", task)})


def calibration_text():
    """None of it is in a held-out split or in the perplexity text."""
    known = {document.prompt for name in SPLIT_SIZES for task in TASKS for document in split(name, task)}
    return text("calibration", CALIBRATION_SIZE, known | {document.prompt for document in perplexity_text()})


def held_out():
    """Hashes of all prompts that training must never see."""
    documents = perplexity_text()
    for name in SPLIT_SIZES:
        for task in TASKS:
            documents += split(name, task)
    return {prompt_hash(document.prompt) for document in documents}


class TrainingStream:
    """Seeded training documents; `skipped` counts the held-out ones that were dropped."""

    def __init__(self, seed):
        self.seed = seed
        self.forbidden = held_out()
        self.skipped = 0

    def pool(self, index, size, drill_share, short_share):
        """Documents of pool `index`; the same arguments always give the same documents."""
        rng = random.Random(f"train {self.seed} {index}")
        documents = []
        while len(documents) < size:
            if rng.random() < drill_share:
                document = rng.choice(DRILLS)(rng)
            else:
                task = rng.choices(list(TASK_SHARES), list(TASK_SHARES.values()))[0]
                document = TASKS[task](rng, short=rng.random() < short_share)
            if prompt_hash(document.prompt) in self.forbidden:
                self.skipped += 1
            else:
                documents.append(document)
        return documents

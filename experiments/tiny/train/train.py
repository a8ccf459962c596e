"""Train the model for a fixed number of steps: train.py BUILD_DIR [--steps N] [--stop-at N]

Reads BUILD_DIR/tokenizer.json, writes BUILD_DIR/checkpoint.pt every few steps and goes on from it
if it is there. Learning rates and curriculum follow the step, never the clock.
"""
import argparse
import collections
import math
import os
import pathlib
import random
import time

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from documents import TrainingStream
from muon import Muon
from net import CONFIG, TinyLlama, count_parameters, random_start
from start import structured_start

STEPS = 2600
BATCH_TOKENS = 2048  # padding included
POOL = 256  # documents sorted by length together
DATA_SEED, RANDOM_SEED, STRUCTURE_SEED = 100, 1, 3
MUON_RATE, ADAM_RATE = .012, 5e-3
WARM_UP, RATE_FLOOR = .01, .01
PROMPT_WEIGHT = .1  # of a prompt token in the loss; an answer token has 1
CHECKPOINT_EVERY, LOG_EVERY = 200, 25


def rate_factor(step, steps):
    """Linear warm-up, then a cosine to the floor."""
    done = step / steps
    rise = min(1, (step + 1) / (WARM_UP * steps))
    fall = .5 + .5 * math.cos(math.pi * max(0, done - WARM_UP) / (1 - WARM_UP))
    return rise * (RATE_FLOOR + (1 - RATE_FLOOR) * fall)


def drill_share(done):
    return max(.05, .45 * (1 - done / .30))


def short_share(done):
    return max(.08, .60 * (1 - done / .45))


def make_batches(documents, tokenizer, rng):
    """Documents of like length together, about BATCH_TOKENS each, in random order.

    An item is (ids, length of the prompt with its start token, task).
    """
    prompts = tokenizer.encode_batch([document.prompt for document in documents])
    answers = tokenizer.encode_batch([document.answer for document in documents],
                                     add_special_tokens=False)
    items = [(prompt.ids + answer.ids + [CONFIG["eos_token_id"]], len(prompt.ids), document.task)
             for prompt, answer, document in zip(prompts, answers, documents)]
    items.sort(key=lambda item: len(item[0]))
    batches, batch = [], []
    for item in items:
        if batch and len(item[0]) * (len(batch) + 1) > BATCH_TOKENS:
            batches.append(batch)
            batch = []
        batch.append(item)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


def to_tensors(batch):
    """Padded ids (batch, length) and the loss weight of each as a target."""
    length = max(len(ids) for ids, _, _ in batch)
    ids = torch.full((len(batch), length), CONFIG["pad_token_id"])
    weight = torch.zeros(len(batch), length)
    for row, (tokens, prompt_length, _) in enumerate(batch):
        ids[row, :len(tokens)] = torch.tensor(tokens)
        weight[row, 1:prompt_length] = PROMPT_WEIGHT
        weight[row, prompt_length:len(tokens)] = 1
    return ids, weight


class Run:
    """Everything that a checkpoint holds."""

    def __init__(self, build_dir, steps):
        self.path = build_dir / "checkpoint.pt"
        self.steps = steps
        self.tokenizer = Tokenizer.from_file(str(build_dir / "tokenizer.json"))
        self.stream = TrainingStream(DATA_SEED)
        self.net = TinyLlama(CONFIG)
        random_start(self.net, RANDOM_SEED)
        structured_start(self.net, STRUCTURE_SEED)
        matrices = [part.weight for part in self.net.matrices().values()]
        known = {id(weight) for weight in matrices}
        self.others = [weight for weight in self.net.parameters() if id(weight) not in known]
        self.muon = Muon(matrices, MUON_RATE)
        self.adam = torch.optim.AdamW(self.others, ADAM_RATE, betas=(.9, .98), weight_decay=0)
        # step done so far; the pool in use, its place, the step at which it was drawn; held-out
        # documents dropped (going on from a checkpoint counts those of its pool twice)
        self.at = dict(step=0, pool=0, batch=0, pool_step=0, tokens=0, skipped=0, seconds=0.)
        self.skipped_before = 0

    def save(self):
        partial = self.path.with_suffix(".partial")
        torch.save(dict(steps=self.steps, at=self.at, net=self.net.state_dict(),
                        muon=self.muon.state_dict(), adam=self.adam.state_dict()), partial)
        os.replace(partial, self.path)

    def load(self):
        saved = torch.load(self.path)
        if saved["steps"] != self.steps:
            raise SystemExit(f"{self.path} is of a run of {saved['steps']} steps, "
                             f"asked for {self.steps}: remove it or give --steps")
        self.at = saved["at"]
        self.skipped_before = self.at["skipped"]
        self.net.load_state_dict(saved["net"])
        self.muon.load_state_dict(saved["muon"])
        self.adam.load_state_dict(saved["adam"])

    def pool_batches(self):
        done = self.at["pool_step"] / self.steps
        documents = self.stream.pool(self.at["pool"], POOL, drill_share(done), short_share(done))
        rng = random.Random(f"order {DATA_SEED} {self.at['pool']}")
        return make_batches(documents, self.tokenizer, rng)

    def batches(self):
        """All further batches; `at` says where we are."""
        while True:
            batches = self.pool_batches()
            self.at["skipped"] = self.skipped_before + self.stream.skipped
            while self.at["batch"] < len(batches):
                yield batches[self.at["batch"]]
                self.at["batch"] += 1
            self.at.update(pool=self.at["pool"] + 1, batch=0, pool_step=self.at["step"])

    def train_step(self, batch):
        """Returns the answer loss (sum, tokens) per task."""
        factor = rate_factor(self.at["step"], self.steps)
        self.muon.param_groups[0]["lr"] = MUON_RATE * factor
        self.adam.param_groups[0]["lr"] = ADAM_RATE * factor
        ids, weight = to_tensors(batch)
        weight = weight[:, 1:].reshape(-1)
        used = weight.nonzero()[:, 0]
        states = self.net.hidden(ids[:, :-1]).reshape(-1, CONFIG["hidden_size"])[used]
        losses = F.cross_entropy(self.net.logits(states), ids[:, 1:].reshape(-1)[used],
                                 reduction="none")
        self.net.zero_grad(set_to_none=True)
        ((losses * weight[used]).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self.adam.step()
        self.muon.step()

        answer = torch.zeros_like(weight)
        answer[used] = losses.detach() * (weight[used] == 1)
        per_row = answer.view(len(batch), -1).sum(1).tolist()
        result = collections.defaultdict(lambda: [0., 0])
        for (tokens, prompt_length, task), loss in zip(batch, per_row):
            result[task][0] += loss
            result[task][1] += len(tokens) - prompt_length
        return result


def log_line(run, losses, began):
    at = run.at
    parts = " ".join(f"{task} {total / count:.3f}" for task, (total, count)
                     in sorted(losses.items()))
    print(f"step {at['step']}/{run.steps} tokens {at['tokens']} minutes {began / 60:.1f} "
          f"tokens/s {at['tokens'] / began:.0f} skipped {at['skipped']} loss {parts}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build_dir", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="length of the whole schedule")
    parser.add_argument("--stop-at", type=int, help="save and stop at this step")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    run = Run(arguments.build_dir, arguments.steps)
    if run.path.exists():
        run.load()
    print(f"{count_parameters(run.net)} parameters, from step {run.at['step']}", flush=True)
    clock = time.time() - run.at["seconds"]
    end = min(run.steps, arguments.stop_at or run.steps)
    losses = collections.defaultdict(lambda: [0., 0])
    for batch in run.batches():
        if run.at["step"] >= end:
            break
        for task, (total, count) in run.train_step(batch).items():
            losses[task][0] += total
            losses[task][1] += count
        run.at["step"] += 1
        run.at["tokens"] += sum(len(item[0]) for item in batch)
        run.at["seconds"] = time.time() - clock
        if run.at["step"] % LOG_EVERY == 0:
            log_line(run, losses, run.at["seconds"])
            losses.clear()
        if run.at["step"] % CHECKPOINT_EVERY == 0:
            run.at["batch"] += 1  # a checkpoint points at the next batch
            run.save()
            run.at["batch"] -= 1
    run.save()
    print(f"done: {run.at['step']} steps, {run.at['tokens']} tokens, "
          f"{run.at['seconds'] / 60:.1f} minutes, {run.at['skipped']} held-out documents skipped")


if __name__ == "__main__":
    main()

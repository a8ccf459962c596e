"""Measure a model folder: evaluate.py FOLDER TASKS_DIR OUT_DIR [--prompts N]

Weights are the folder's float16 values, the arithmetic is float32. Beside them, weights rounded
to 4, 3 and 2 bits by a simple simulation: each row in groups of 64, each group on the even grid
of least squared error, no calibration data, nothing nested; the embedding stays. Writes the
greedy answers to OUT_DIR/answers_<weights>.jsonl and all figures to OUT_DIR/evaluation.json.
"""
import argparse
import collections
import json
import math
import os
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from documents import TASKS, TrainingStream, perplexity_text
from net import CONFIG, TinyLlama

GROUP, FIT_ROUNDS = 64, 20
TINY = 1e-12  # keeps a group of equal weights from dividing by zero
LONGEST_ANSWER = 260
UNIGRAM_SEED, UNIGRAM_DOCUMENTS = 200, 5000


def load_net(folder):
    net = TinyLlama(CONFIG)
    weights = load_file(str(folder / "model.safetensors"))
    net.load_state_dict({name: torch.tensor(value).float() for name, value in weights.items()})
    return net.eval()


def round_to_grid(weight, bits):
    """Alternate nearest codes and least-squares step and offset, per group."""
    groups = weight.view(-1, GROUP)
    top = 2 ** bits - 1
    low, high = groups.min(1, keepdim=True)[0], groups.max(1, keepdim=True)[0]
    middle = (low + high) / 2
    best, best_error = None, None
    for shrink in (1.0, .85, .7, .55):
        step = ((high - low) * shrink / top).clamp(min=TINY)
        offset = middle - step * top / 2
        for _ in range(FIT_ROUNDS):
            codes = ((groups - offset) / step).round().clamp(0, top)
            centred = codes - codes.mean(1, keepdim=True)
            spread = centred.pow(2).sum(1, keepdim=True).clamp(min=TINY)
            step = ((centred * groups).sum(1, keepdim=True) / spread).clamp(min=TINY)
            offset = groups.mean(1, keepdim=True) - step * codes.mean(1, keepdim=True)
        codes = ((groups - offset) / step).round().clamp(0, top)
        rounded = offset + step * codes
        error = (rounded - groups).pow(2).sum(1, keepdim=True)
        if best is None:
            best, best_error = rounded, error
        else:
            best = torch.where(error < best_error, rounded, best)
            best_error = torch.minimum(error, best_error)
    return best.view_as(weight)


def low_bit_weights(net, bits):
    """Name -> rounded weight, and the relative error of all weights together."""
    rounded, error, size = {}, 0., 0.
    for name, part in net.matrices().items():
        rounded[name] = round_to_grid(part.weight.data, bits)
        error += float((rounded[name] - part.weight.data).pow(2).sum())
        size += float(part.weight.data.pow(2).sum())
    return rounded, math.sqrt(error / size)


@torch.no_grad()
def perplexities(net, tokenizer, documents):
    """Each document by itself after the start token; the end token is not counted."""
    totals = collections.defaultdict(lambda: [0., 0])
    for document in documents:
        prompt = tokenizer.encode(document.prompt).ids
        answer = tokenizer.encode(document.answer, add_special_tokens=False).ids
        ids = torch.tensor([prompt + answer])
        losses = F.cross_entropy(net.logits(net.hidden(ids[:, :-1]))[0], ids[0, 1:],
                                 reduction="none")
        for name, part in (("all_text", losses), ("answers", losses[len(prompt) - 1:]),
                           (f"answers_{document.task}", losses[len(prompt) - 1:])):
            totals[name][0] += float(part.sum())
            totals[name][1] += len(part)
    return {name: dict(perplexity=math.exp(total / count), tokens=count)
            for name, (total, count) in totals.items()}


def unigram_perplexity(tokenizer, documents):
    """Token frequencies of training documents (one added to each count), on the same tokens."""
    training = TrainingStream(UNIGRAM_SEED).pool(0, UNIGRAM_DOCUMENTS, 0, 0)
    counts = collections.Counter({token: 1 for token in range(CONFIG["vocab_size"])})
    for encoded in tokenizer.encode_batch([one.prompt + one.answer for one in training],
                                          add_special_tokens=False):
        counts.update(encoded.ids)
    all_counts = sum(counts.values())
    loss = [-math.log(counts[token] / all_counts) for one in documents
            for token in tokenizer.encode(one.prompt + one.answer, add_special_tokens=False).ids]
    return math.exp(sum(loss) / len(loss))


@torch.no_grad()
def greedy_answers(net, prompts):
    """Lists of ids -> lists of ids, each up to its end token or LONGEST_ANSWER."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.full((len(prompts), int(lengths.max())), CONFIG["pad_token_id"])
    for row, prompt in enumerate(prompts):
        ids[row, :len(prompt)] = torch.tensor(prompt)
    cache = net.new_cache(len(prompts), int(lengths.max()) + LONGEST_ANSWER)
    states = net.prefill(ids, cache)[torch.arange(len(prompts)), lengths - 1]
    answers, active, positions = [[] for _ in prompts], torch.arange(len(prompts)), lengths
    for _ in range(LONGEST_ANSWER):
        tokens = net.logits(states).argmax(-1)
        going = tokens != CONFIG["eos_token_id"]
        if not going.all():
            active, positions, tokens = active[going], positions[going], tokens[going]
            cache = [(keys[going], values[going]) for keys, values in cache]
        if len(active) == 0:
            break
        for row, token in zip(active.tolist(), tokens.tolist()):
            answers[row].append(token)
        states = net.step(tokens, positions, cache)
        positions = positions + 1
    return answers


def test_rows(tasks_dir, prompts):
    rows = []
    for task in TASKS:
        lines = (tasks_dir / f"tiny_{task}.jsonl").read_text().splitlines()
        rows += [row for row in map(json.loads, lines) if row["split"] == "test"][:prompts]
    return rows


def write_answers(path, rows, texts):
    with path.open("w") as out:
        for row, text in zip(rows, texts):
            out.write(json.dumps(dict(question_id=row["id"], choices=[dict(turns=[text])])) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("tasks_dir", type=pathlib.Path)
    parser.add_argument("out_dir", type=pathlib.Path)
    parser.add_argument("--prompts", type=int, default=100, help="test prompts per task")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    sys.path.insert(0, str(arguments.tasks_dir))
    from score_facts import score
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    net = load_net(arguments.folder)
    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    documents = perplexity_text()
    text = "\n\n".join(document.prompt + document.answer for document in documents) + "\n"
    if text != (arguments.tasks_dir / "tiny_test.txt").read_text():
        sys.exit("tiny_test.txt is not what the generator gives")
    rows = test_rows(arguments.tasks_dir, arguments.prompts)
    figures = dict(unigram_perplexity=unigram_perplexity(tokenizer, documents))
    print(f"unigram perplexity of all text {figures['unigram_perplexity']:.2f}", flush=True)
    original = {name: part.weight.data.clone() for name, part in net.matrices().items()}
    for name, bits in (("fp16", 16), ("4bit", 4), ("3bit", 3), ("2bit", 2)):
        weights, error = (original, 0.) if bits == 16 else low_bit_weights(net, bits)
        for key, part in net.matrices().items():
            part.weight.data = weights[key]
        perplexity = perplexities(net, tokenizer, documents)
        texts = []
        for task in TASKS:
            prompts = [tokenizer.encode(row["turns"][0]).ids for row in rows
                       if row["task"] == task]
            texts += [tokenizer.decode(ids) for ids in greedy_answers(net, prompts)]
        write_answers(arguments.out_dir / f"answers_{name}.jsonl", rows, texts)
        scores = score({row["id"]: one for row, one in zip(rows, texts)}, rows)
        figures[name] = dict(weight_error=error, perplexity=perplexity, scores=scores)
        print(f"{name}: weight error {error:.3f}, perplexity " + ", ".join(
            f"{key} {value['perplexity']:.3f}" for key, value in perplexity.items()))
        print("  " + ", ".join(
            f"{task} facts {one['facts']:.1f} [{one['facts_low']:.1f}, {one['facts_high']:.1f}] "
            f"exact {one['exact']:.1f} (n={one['n']})" for task, one in scores.items()), flush=True)
        for key, part in net.matrices().items():
            part.weight.data = original[key]
    (arguments.out_dir / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

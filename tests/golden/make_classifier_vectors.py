#!/usr/bin/env python3
"""Scores, losses, gradients and AdamW steps of sched/classifier.h's network, by PyTorch's automatic
differentiation, into tests/golden/classifier.h5. Made once with PyTorch 2.15 on a CPU, in f64, which
is what tests/unit/test_train.c holds ours against.
usage: make_classifier_vectors.py [OUT.h5]
SPDX-License-Identifier: Apache-2.0
"""
import pathlib
import sys

import h5py
import numpy as np
import torch
from torch import nn

torch.set_default_dtype(torch.float64)
D, GROUPS, QUERIES, HIDDEN, CLASSES, UPDATES = 4, 2, 3, 6, 3, 5
TOKENS, LABELS = [3, 1, 7, 5, 2], [2, 0, 1, 2, 1]
LEARNING_RATE, DECAY = 0.01, 0.1


class Network(nn.Module):
    def __init__(self, kind, n_in):
        super().__init__()
        self.kind = kind
        if kind != "step":
            self.query = nn.Parameter(torch.randn(GROUPS, QUERIES, D))
        self.norm = nn.LayerNorm(n_in)
        nn.init.normal_(self.norm.weight, 1, 0.2)
        nn.init.normal_(self.norm.bias, 0, 0.2)
        self.first, self.second = nn.Linear(n_in, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, features):
        if self.kind == "step":
            x = features
        else:
            k, v = features[0], features[1]  # (1 or GROUPS, tokens, D)
            x = nn.functional.scaled_dot_product_attention(self.query, k.expand(GROUPS, -1, -1), v.expand(GROUPS, -1, -1))
            x = x.mean(dim=1).flatten()
        return self.second(torch.relu(self.first(self.norm(x))))

    def flat(self, get):
        order = ([] if self.kind == "step" else [self.query]) + [
            self.norm.weight, self.norm.bias, self.first.weight, self.first.bias, self.second.weight, self.second.bias]
        return np.concatenate([get(p).detach().numpy().ravel() for p in order])


def case(group, kind, generator):
    heads = {"kv1": 1, "kv2": GROUPS, "step": 0}[kind]
    n_in = 7 if kind == "step" else GROUPS * D
    net = Network(kind, n_in)
    samples = [generator.standard_normal((n_in,) if kind == "step" else (2, heads, t, D)).astype(np.float32) for t in TOKENS]
    with torch.no_grad():  # values that a float holds: both sides then start from the same
        for p in net.parameters():
            p.copy_(p.float().double())
    weights = [p for name, p in net.named_parameters() if name in ("first.weight", "second.weight")]
    others = [p for p in net.parameters() if not any(p is w for w in weights)]
    adamw = torch.optim.AdamW([{"params": weights, "weight_decay": DECAY}, {"params": others, "weight_decay": 0}], lr=LEARNING_RATE)
    labels = torch.tensor(LABELS)

    def losses():
        logits = torch.stack([net(torch.from_numpy(s).double()) for s in samples])
        return logits, nn.functional.cross_entropy(logits, labels, reduction="none")

    group["samples"] = np.concatenate([s.ravel() for s in samples])
    group["params"] = net.flat(lambda p: p)
    logits, loss = losses()
    loss.sum().backward()
    group["probabilities"] = torch.softmax(logits, dim=1).detach().numpy()
    group["loss"] = loss.detach().numpy()
    group["gradient"] = net.flat(lambda p: p.grad)
    for _ in range(UPDATES):
        adamw.zero_grad()
        losses()[1].mean().backward()
        adamw.step()
    group["after"] = net.flat(lambda p: p)
    group["after_loss"] = losses()[1].detach().numpy()


def main():
    out = sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("classifier.h5")
    torch.manual_seed(20)
    generator = np.random.default_rng(20)
    with h5py.File(out, "w") as file:
        for kind in ("kv1", "kv2", "step"):
            case(file.create_group(kind), kind, generator)


main()

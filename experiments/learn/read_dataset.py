#!/usr/bin/env python3
"""Trains a learned scheduler's classifier with PyTorch on what `pmpd dataset` wrote: an example to start
from. Reads the dataset through h5py, trains the same network that `pmpd train` trains, prints accuracy on
the validation split, and writes a classifier that `pmpd run` reads.
usage: read_dataset.py DATASET.h5 CLASSIFIER.h5
SPDX-License-Identifier: Apache-2.0
"""
import sys

import h5py
import torch
from torch import nn

from write_classifier import write

GROUPS, QUERIES, EPOCHS, BATCH = 4, 4, 30, 32


class Network(nn.Module):
    def __init__(self, head_dim, n_classes):
        super().__init__()
        n_in = GROUPS * head_dim
        self.query = nn.Parameter(torch.randn(GROUPS, QUERIES, head_dim) / head_dim ** 0.5)
        self.mlp = nn.Sequential(nn.LayerNorm(n_in), nn.Linear(n_in, n_in), nn.ReLU(), nn.Dropout(0.1),
                                 nn.Linear(n_in, n_classes))

    def forward(self, k, v):  # (tokens, head_dim) each
        weight = torch.softmax(self.query @ k.T / k.shape[1] ** 0.5, dim=-1)
        return self.mlp((weight @ v).mean(dim=1).flatten())  # scores: the loss takes the softmax


def main(path, out):
    with h5py.File(path) as data:
        rows, offset = data["rows"][()], data["kv_features/offset"][()]
        values = torch.from_numpy(data["kv_features/values"][()])  # (token, K or V, dimension)
        if data["n_kv_heads"][()] != 1:
            sys.exit("this example pools the mean over heads: make the dataset without --heads all")
        class_at, facts = data["class_at"][()], {name: data.attrs[name] for name in ("model_digest", "high", "low")}
    features = [(values[a:b, 0], values[a:b, 1]) for a, b in zip(offset[:-1], offset[1:])]
    labels = torch.from_numpy(rows["label"].astype("int64"))
    train, validation = ([i for i, split in enumerate(rows["split"]) if split == s] for s in (0, 1))
    torch.manual_seed(1)
    net = Network(values.shape[2], len(class_at))
    adamw = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for epoch in range(EPOCHS):
        net.train()
        order = [train[i] for i in torch.randperm(len(train))]
        for batch in (order[i:i + BATCH] for i in range(0, len(order), BATCH)):
            scores = torch.stack([net(*features[i]) for i in batch])
            adamw.zero_grad()
            nn.functional.cross_entropy(scores, labels[batch]).backward()
            adamw.step()
        net.eval()
        with torch.no_grad():
            right = sum(int(net(*features[i]).argmax() == labels[i]) for i in validation)
        print(f"epoch {epoch}: validation accuracy {right / max(1, len(validation)):.4f}")
    norm, first, second = net.mlp[0], net.mlp[1], net.mlp[4]
    write(out, net.query, norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias, class_at,
          training=f"experiments/learn/read_dataset.py, {EPOCHS} epochs", **facts)


if len(sys.argv) != 3:
    sys.exit(__doc__)
main(*sys.argv[1:])

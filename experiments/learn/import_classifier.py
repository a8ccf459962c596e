#!/usr/bin/env python3
"""Turns a classifier of the PMPD authors' code (classifier_*.pt, a torch state dict) into a file that pmpd
reads. Tensors are told by their shapes: a query (H, H, d), a layer norm (H d), two linear layers.
usage: import_classifier.py CLASSIFIER.pt OUT.h5 --high B --low B [--class-at "0 1/3 2/3 1"]
                            [--model-digest HEX]
The file does not say which model it is for; without --model-digest (pmpd inspect MODEL prints it) pmpd
takes it for any model with fitting heads.
SPDX-License-Identifier: Apache-2.0
"""
import argparse
from fractions import Fraction

import torch

from write_classifier import write


def pick(state):
    """(query, gain, bias, w1, b1, w2, b2) of a state dict, whatever its names are."""
    order = list(state.items())  # of definition
    queries = [v for _, v in order if v.dim() == 3 and v.shape[0] == v.shape[1]]
    if len(queries) != 1:
        raise SystemExit(f"expected one query (H, H, d), found shapes {[tuple(v.shape) for _, v in order]}")
    width = queries[0].shape[0] * queries[0].shape[2]
    matrices = [(name, v) for name, v in order if v.dim() == 2]
    if len(matrices) != 2 or matrices[0][1].shape[1] != width or matrices[1][1].shape[1] != matrices[0][1].shape[0]:
        raise SystemExit(f"expected linear layers ({width}, h) and (h, classes), found "
                         f"{[tuple(v.shape) for _, v in matrices]}")

    def bias(name):
        return state[name.rsplit(".", 1)[0] + ".bias"]

    biases = {name.rsplit(".", 1)[0] for name, _ in matrices}
    norms = [(name, v) for name, v in order if v.dim() == 1 and name.rsplit(".", 1)[0] not in biases]
    gain = [v for name, v in norms if name.endswith("weight")]
    shift = [v for name, v in norms if name.endswith("bias")]
    if len(gain) != 1 or len(shift) != 1 or gain[0].shape[0] != width:
        raise SystemExit(f"expected a layer norm of {width}, found {[(n, tuple(v.shape)) for n, v in norms]}")
    (first, w1), (second, w2) = matrices
    return queries[0], gain[0], shift[0], w1, bias(first), w2, bias(second)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--high", required=True)
    parser.add_argument("--low", required=True)
    parser.add_argument("--class-at", default="0 1/3 2/3 1")
    parser.add_argument("--model-digest", default="")
    args = parser.parse_args()
    state = torch.load(args.source, map_location="cpu", weights_only=True)
    parts = [tensor.float() for tensor in pick(state.get("state_dict", state))]
    class_at = [float(Fraction(word)) for word in args.class_at.split()]
    write(args.out, *parts, class_at=class_at, high=args.high, low=args.low, model_digest=args.model_digest,
          training=f"imported from {args.source}")
    print(f"{args.out}: query {tuple(parts[0].shape)}, {parts[5].shape[0]} classes")


main()

#!/usr/bin/env python3
"""The plans of the oracle policy from a dataset of the prompts that it will decode: the earliest candidate
switch that is as good as the high level alone; what no scheduler can know before.
usage: oracle_plans.py DATASET.h5 OUT.jsonl
SPDX-License-Identifier: Apache-2.0
"""
import json
import sys

import h5py

if len(sys.argv) != 3:
    sys.exit(__doc__)
with h5py.File(sys.argv[1]) as data, open(sys.argv[2], "w") as out:
    high, low, at, t = data.attrs["high"], data.attrs["low"], data["class_at"][()], data["max_new_tokens"][()]
    for row in data["rows"][()]:
        step = int(at[row["label"]] * t + 1e-6)
        points = [f"0:{high}"] * (step > 0) + [f"{step}:{low}"] * (step < t)
        out.write(json.dumps(dict(id=row["id"].decode(), turn=0, plan=" ".join([f"prefill:{high}", *points]))) + "\n")

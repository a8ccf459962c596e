"""Writes a classifier file that pmpd reads (sched/classifier_file.c), from arrays: NumPy's, or PyTorch's.
SPDX-License-Identifier: Apache-2.0
"""
import h5py
import numpy as np


def write(path, query, norm_gain, norm_bias, w1, b1, w2, b2, class_at, high, low, model_digest="", training=""):
    """query (groups, queries, head_dim); w1, w2 (out, in); class_at: ascending fractions, one per class."""
    def array(x):
        return np.asarray(x.detach().cpu().numpy() if hasattr(x, "detach") else x, dtype="<f4")

    parts = dict(query=query, norm_gain=norm_gain, norm_bias=norm_bias, w1=w1, b1=b1, w2=w2, b2=b2)
    parts = {name: array(value) for name, value in parts.items()}
    groups, queries, head_dim = parts["query"].shape
    classes, hidden = parts["w2"].shape
    names = ("head_dim", "n_kv_heads", "n_groups", "n_queries", "n_in", "n_hidden", "n_classes")
    sizes = (head_dim, 1, groups, queries, groups * head_dim, hidden, classes)
    if parts["w1"].shape != (hidden, groups * head_dim) or len(class_at) != classes:
        raise ValueError(f"sizes disagree: query {parts['query'].shape}, w1 {parts['w1'].shape}, w2 "
                         f"{parts['w2'].shape}, {len(class_at)} classes")
    with h5py.File(path, "w") as file:
        file.attrs.update(format="pmpd classifier", format_version="1", kind="kv", model_digest=model_digest, high=high,
                          low=low)
        file.create_dataset("training", data=training, dtype=h5py.string_dtype())
        file["shape"] = np.array([sizes], dtype=[(name, "<i4") for name in names])
        file["class_at"] = np.asarray(class_at, dtype="<f8")
        for name, value in parts.items():
            file[name] = value

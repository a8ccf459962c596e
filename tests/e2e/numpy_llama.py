"""An independent Llama forward pass in NumPy (float64), from the published definition of the model and
from the written definition of the nested format; shares no code with pmpd. The oracle of the end-to-end
tests."""
import json
import pathlib
import struct

import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1"}


def read_safetensors(path):
    """{name: array} of one safetensors file; bfloat16 is widened to float32."""
    data = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[8 + size + begin:8 + size + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def nested_weight(tensors, name, entry, group, bits):
    """The b-bit matrix: the first b planes as codes, the levels of b as numbers."""
    planes = tensors[name + ".planes"][:bits]
    columns = np.unpackbits(planes, axis=2, bitorder="little").astype(np.float64)
    n_rows = planes.shape[1]
    kind = entry["levels"][str(bits)]

    def per_column(values):
        return np.repeat(values.astype(np.float64), group, axis=1)

    if kind == "tied":
        code = sum(columns[p] * 2 ** (bits - 1 - p) for p in range(bits))
        weight = per_column(tensors[f"{name}.offset.{bits}"]) + per_column(
            tensors[f"{name}.scale.{bits}"]) * (2 * code - (2 ** bits - 1)) / 2
    elif kind == "free":
        alpha = tensors[f"{name}.alpha.{bits}"]
        weight = per_column(tensors[f"{name}.offset.{bits}"])
        for p in range(bits):
            weight = weight + per_column(alpha[:, :, p]) * (2 * columns[p] - 1)
    elif kind == "tail":
        high = sum(columns[p] * 2 ** (3 - p) for p in range(4))
        low = sum(columns[4 + p] * 2 ** (3 - p) for p in range(4))
        weight = (per_column(tensors[name + ".offset.8"])
                  + per_column(tensors[name + ".scale.8"]) * (2 * high - 15) / 2
                  + per_column(tensors[name + ".tail.8"]) * (2 * low - 15) / 2)
    else:
        raise ValueError(kind)
    return weight.reshape(n_rows, -1)[:, :entry["n_cols"]]


class Model:
    """A Hugging Face folder, plain or nested at the given bits."""

    def __init__(self, folder, bits=None):
        folder = pathlib.Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = read_safetensors(folder / "model.safetensors")
        self.bits = bits

    def weight(self, name):
        if name + ".weight" in self.tensors:
            return self.tensors[name + ".weight"].astype(np.float64)
        quant = self.config["quantization_config"]
        return nested_weight(self.tensors, name, quant["linears"][name], quant["group_size"], self.bits)

    def last_kv(self, ids):
        """K (rotated) and V of the last layer, each (len(ids), KV heads, head_dim)."""
        self.logits(ids)
        return self.kv

    def logits(self, ids):
        """(len(ids), vocabulary): row i is what follows ids[0..i]."""
        c = self.config
        n_heads, n_kv = c["num_attention_heads"], c["num_key_value_heads"]
        dim = c.get("head_dim") or c["hidden_size"] // n_heads
        n = len(ids)

        def norm(x, gain):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * gain

        frequency = c.get("rope_theta", 10000.0) ** (-np.arange(0, dim, 2) / dim)
        angle = np.outer(np.arange(n), frequency)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

        def rotate(x):
            a, b = x[..., :dim // 2], x[..., dim // 2:]
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        table = self.weight("model.embed_tokens")
        x = table[ids]
        mask = np.triu(np.full((n, n), -np.inf), 1)
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            h = norm(x, self.weight(at + "input_layernorm"))
            q = rotate((h @ self.weight(at + "self_attn.q_proj").T).reshape(n, n_heads, dim))
            k = rotate((h @ self.weight(at + "self_attn.k_proj").T).reshape(n, n_kv, dim))
            v = (h @ self.weight(at + "self_attn.v_proj").T).reshape(n, n_kv, dim)
            self.kv = k, v
            k, v = (np.repeat(t, n_heads // n_kv, axis=1) for t in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            mixed = np.einsum("hqk,khd->qhd", scores, v).reshape(n, -1)
            x = x + mixed @ self.weight(at + "self_attn.o_proj").T
            h = norm(x, self.weight(at + "post_attention_layernorm"))
            gate = h @ self.weight(at + "mlp.gate_proj").T
            up = h @ self.weight(at + "mlp.up_proj").T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weight(at + "mlp.down_proj").T
        x = norm(x, self.weight("model.norm"))
        head = "lm_head"
        nested = self.config.get("quantization_config", {}).get("linears", {})
        if head + ".weight" not in self.tensors and head not in nested:
            return x @ table.T
        return x @ self.weight(head).T

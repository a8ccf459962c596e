"""An independent forward pass in NumPy (float64) of Llama and its relatives, from the published
definitions of the models and from the written definition of the nested format; shares no code with pmpd.
The oracle of the end-to-end tests."""
import json
import math
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


def frequencies(config, dim):
    """Radians per position of each pair of dimensions."""
    plain = config.get("rope_theta", 10000.0) ** (-np.arange(0, dim, 2) / dim)
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return plain / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        original = scaling["original_max_position_embeddings"]
        wavelength = 2 * np.pi / plain
        smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
        return (1 - smooth) * plain / scaling["factor"] + smooth * plain
    assert kind == "default", kind
    return plain


def silu(x):
    return x / (1 + np.exp(-x))


ACTIVATIONS = {
    "silu": silu,
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3))),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
}


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

    def bias(self, name):
        return self.tensors[name + ".bias"].astype(np.float64) if name + ".bias" in self.tensors else 0.0

    def linear(self, name, x):
        return x @ self.weight(name).T + self.bias(name)

    def norm(self, name, x):
        """RMS norm, or layer norm where there is a bias."""
        if name + ".bias" not in self.tensors:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * self.weight(name)
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["layer_norm_eps"])
        return x * self.weight(name) + self.bias(name)

    def attention(self, at, h):
        c, n = self.config, len(h)
        n_heads = c["num_attention_heads"]
        n_kv = c.get("num_key_value_heads") or n_heads
        dim = c.get("head_dim") or c["hidden_size"] // n_heads
        turning = int(c.get("partial_rotary_factor", 1.0) * dim)
        angle = np.outer(np.arange(n), frequencies(c, turning))
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

        def rotate(x):
            a, b = x[..., :turning // 2], x[..., turning // 2:turning]
            return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., turning:]], -1)

        q = rotate(self.linear(at + "q_proj", h).reshape(n, n_heads, dim))
        k = rotate(self.linear(at + "k_proj", h).reshape(n, n_kv, dim))
        v = self.linear(at + "v_proj", h).reshape(n, n_kv, dim)
        self.kv = k, v
        k, v = (np.repeat(t, n_heads // n_kv, axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim) + np.triu(np.full((n, n), -np.inf), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", scores, v).reshape(n, -1)
        return self.linear(at + ("dense" if c["model_type"] == "phi" else "o_proj"), mixed)

    def mlp(self, at, h):
        act = ACTIVATIONS[self.config.get("hidden_act", "silu")]
        if self.config["model_type"] == "phi":
            return self.linear(at + "fc2", act(self.linear(at + "fc1", h)))
        return self.linear(at + "down_proj", act(self.linear(at + "gate_proj", h)) * self.linear(at + "up_proj", h))

    def logits(self, ids):
        """(len(ids), vocabulary): row i is what follows ids[0..i]."""
        c = self.config
        phi = c["model_type"] == "phi"
        table = self.weight("model.embed_tokens")
        x = table[ids]
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            h = self.norm(at + "input_layernorm", x)
            x = x + self.attention(at + "self_attn.", h)
            if not (phi or c.get("use_parallel_residual")):
                h = self.norm(at + "post_attention_layernorm", x)
            x = x + self.mlp(at + "mlp.", h)
        x = self.norm("model.final_layernorm" if phi else "model.norm", x)
        nested = c.get("quantization_config", {}).get("linears", {})
        if "lm_head.weight" not in self.tensors and "lm_head" not in nested:
            return x @ table.T + self.bias("lm_head")
        return self.linear("lm_head", x)

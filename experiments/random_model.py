#!/usr/bin/env python3
"""A model folder of a known shape with random weights: for time and memory, never for quality.

usage: random_model.py SHAPE OUT_DIR [--layers N] [--seed S]

Writes config.json, model.safetensors (F16) and calib.json (16384 random token ids in rows of 512).
"""
import argparse
import json
import pathlib
import struct

import numpy as np

# hidden, ffn, layers, heads, KV heads, vocabulary
SHAPES = {
    "mobilellama-1.4b": (2048, 5632, 24, 16, 16, 32000),
    "vicuna-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
}


def tensors(shape, n_layers):
    """(name, shape, standard deviation) of every tensor; 0: a norm, all ones."""
    hidden, ffn, _, heads, kv_heads, vocab = shape
    kv = hidden // heads * kv_heads
    yield "model.embed_tokens.weight", (vocab, hidden), 0.02
    for layer in range(n_layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,), 0
        yield at + "post_attention_layernorm.weight", (hidden,), 0
        for name, rows, cols in (("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", kv, hidden),
                                 ("self_attn.v_proj", kv, hidden), ("self_attn.o_proj", hidden, hidden),
                                 ("mlp.gate_proj", ffn, hidden), ("mlp.up_proj", ffn, hidden),
                                 ("mlp.down_proj", hidden, ffn)):
            yield f"{at}{name}.weight", (rows, cols), cols ** -0.5
    yield "model.norm.weight", (hidden,), 0
    yield "lm_head.weight", (vocab, hidden), 0.02


def write_weights(path, entries, rng):
    header, at = {}, 0
    for name, shape, _ in entries:
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, shape, deviation in entries:
            if deviation:
                out.write((rng.standard_normal(shape, np.float32) * deviation).astype("<f2").tobytes())
            else:
                out.write(np.ones(shape, "<f2").tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    hidden, ffn, layers, heads, kv_heads, vocab = SHAPES[args.shape]
    layers = args.layers or layers
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=hidden,
                  intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                  num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=2048,
                  rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=False,
                  bos_token_id=1, eos_token_id=2, torch_dtype="float16")
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    write_weights(args.out / "model.safetensors", list(tensors(SHAPES[args.shape], layers)), rng)
    ids = rng.integers(3, vocab, (32, 512)).tolist()
    (args.out / "calib.json").write_text(json.dumps({"ids": ids}))
    print(f"{args.out}: {args.shape}, {layers} layers")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""A model folder of a known shape with random weights: for time and memory, never for quality.

usage: random_model.py SHAPE OUT_DIR [--family llama|qwen2] [--layers N] [--seed S]

SHAPE is a name, or six numbers: hidden,ffn,layers,heads,KV heads,vocabulary (head_dim is hidden / heads).
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
    "qwen2-0.5b": (896, 4864, 24, 14, 2, 151936),
}
# class, which projections have a bias, tied embeddings
FAMILIES = {"llama": ("LlamaForCausalLM", "", False), "qwen2": ("Qwen2ForCausalLM", "qkv", True)}


def shape_of(text):
    if text in SHAPES:
        return SHAPES[text]
    shape = tuple(int(n) for n in text.split(",") if n.isdigit())
    if len(shape) != 6 or min(shape) < 1 or shape[0] % shape[3] or shape[3] % shape[4]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected six numbers, hidden a multiple of heads, these of "
                                         f"KV heads; or one of {', '.join(SHAPES)}")
    return shape


def tensors(shape, n_layers, family):
    """(name, shape, standard deviation) of every tensor; 0: a norm, all ones."""
    hidden, ffn, _, heads, kv_heads, vocab = shape
    kv = hidden // heads * kv_heads
    _, biased, tied = FAMILIES[family]
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
            if name in [f"self_attn.{letter}_proj" for letter in biased]:
                yield f"{at}{name}.bias", (rows,), 0.1
    yield "model.norm.weight", (hidden,), 0
    if not tied:
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
    parser.add_argument("shape", type=shape_of, help=f"six numbers, or one of {', '.join(SHAPES)}")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    hidden, ffn, layers, heads, kv_heads, vocab = args.shape
    layers = args.layers or layers
    architecture, _, tied = FAMILIES[args.family]
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    config = dict(architectures=[architecture], model_type=args.family, hidden_size=hidden,
                  intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                  num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=2048,
                  rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=tied,
                  bos_token_id=1, eos_token_id=2, torch_dtype="float16")
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    write_weights(args.out / "model.safetensors", list(tensors(args.shape, layers, args.family)), rng)
    ids = rng.integers(3, vocab, (32, 512)).tolist()
    (args.out / "calib.json").write_text(json.dumps({"ids": ids}))
    print(f"{args.out}: {args.family} {args.shape}, {layers} layers")


if __name__ == "__main__":
    main()

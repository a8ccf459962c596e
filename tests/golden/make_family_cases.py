"""Writes tests/golden/families: tiny models of every family with random weights (norms and biases, too)
and the logits that Hugging Face transformers gives for 96 tokens, computed in float64 where it lets us.

    python make_family_cases.py [NAME...]

Versions the committed files were made with: transformers 4.44.2, torch 1.13.0, numpy 1.24.2,
safetensors 0.8.0 (python 3.11; any machine with a CPU will do)."""
import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).resolve().parent / "families"
N_IDS = 96

COMMON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              intermediate_size=40, vocab_size=64, max_position_embeddings=128, bos_token_id=1,
              eos_token_id=2, tie_word_embeddings=False)
# heads of 16: 8 frequencies, of which the rule keeps 1, moves 1 and divides 6
LLAMA3 = dict(num_attention_heads=2, num_key_value_heads=1, rope_theta=1000.0,
              rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                original_max_position_embeddings=32))

# name: (configuration class, members beside COMMON)
CASES = {
    "llama": ("LlamaConfig", dict(num_key_value_heads=1, rms_norm_eps=1e-5, tie_word_embeddings=True,
                                  rope_theta=5000.0)),
    "llama-linear": ("LlamaConfig", dict(rope_scaling=dict(type="linear", factor=4.0))),
    "llama-llama3": ("LlamaConfig", LLAMA3),
    "llama-bias": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralConfig", dict(sliding_window=None, rope_theta=1e6)),
    "qwen2": ("Qwen2Config", dict(rope_theta=1e6, use_sliding_window=False, sliding_window=64)),
    "qwen2-tied": ("Qwen2Config", dict(num_hidden_layers=3, num_key_value_heads=1, intermediate_size=24,
                                       tie_word_embeddings=True)),
    "stablelm": ("StableLmConfig", dict(num_attention_heads=2, num_key_value_heads=1,
                                        partial_rotary_factor=0.25, use_qkv_bias=False)),
    "stablelm-bias": ("StableLmConfig", dict(partial_rotary_factor=0.5, use_qkv_bias=True,
                                             num_key_value_heads=4)),
    "stablelm-parallel": ("StableLmConfig", dict(partial_rotary_factor=0.75, use_parallel_residual=True)),
    "phi": ("PhiConfig", dict(num_key_value_heads=4, hidden_act="gelu_new", partial_rotary_factor=0.5)),
    "phi-gqa-gelu": ("PhiConfig", dict(hidden_act="gelu", num_attention_heads=2, num_key_value_heads=1,
                                       partial_rotary_factor=0.4)),
}


def randomise(model, generator):
    """Every tensor random: gains around 1, biases as large as what they are added to."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            wide = 1.0 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5
            parameter.data = noise * wide
        elif name.endswith(".bias"):
            parameter.data = noise * 0.5
        else:
            parameter.data = 1 + 0.3 * noise


def make(name):
    config_class, members = CASES[name]
    config = getattr(transformers, config_class)(**{**COMMON, **members})
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(1 + list(CASES).index(name))
    model = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32,
                                                          attn_implementation="eager")
    randomise(model, generator)
    model.tie_weights()
    model.eval()
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().numpy().copy() for k, v in model.state_dict().items() if "rotary_emb" not in k}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = config.to_dict()
    written.pop("_attn_implementation", None)
    written["architectures"] = [type(model).__name__]
    keep = config.to_diff_dict().keys() | {"architectures", "model_type", "hidden_act", "torch_dtype",
                                           "num_key_value_heads", "transformers_version",
                                           "tie_word_embeddings"} | members.keys() | COMMON.keys()
    written = {k: v for k, v in sorted(written.items()) if k in keep}
    (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n")
    ids = torch.randint(0, config.vocab_size, (1, N_IDS), generator=generator)
    with torch.no_grad():
        logits = model.double()(ids, use_cache=False).logits[0].double().numpy()
        assert np.isfinite(logits).all()
    np.save(folder / "logits.npy", logits.astype("<f4"))
    (folder / "ids.json").write_text(json.dumps(ids[0].tolist()) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: logits {logits.std():.2f} wide, {size} bytes")


if __name__ == "__main__":
    print(transformers.__version__, torch.__version__, np.__version__)
    for case in sys.argv[1:] or CASES:
        make(case)

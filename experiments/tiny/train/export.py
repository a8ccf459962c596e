"""Write the Hugging Face folder of a finished run: export.py BUILD_DIR OUT_DIR"""
import json
import pathlib
import shutil
import sys

import numpy
import torch
from safetensors.numpy import save_file

from net import CONFIG

MODEL_CONFIG = dict(
    CONFIG, architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
    tie_word_embeddings=True, attention_bias=False, mlp_bias=False, attention_dropout=0.0,
    rope_scaling=None, initializer_range=0.02, pretraining_tp=1, use_cache=True,
    torch_dtype="float16")
TOKENIZER_CONFIG = dict(
    tokenizer_class="PreTrainedTokenizerFast", unk_token="<unk>", bos_token="<s>",
    eos_token="</s>", pad_token="<pad>", add_bos_token=True, add_eos_token=False,
    add_prefix_space=False, clean_up_tokenization_spaces=False,
    model_max_length=CONFIG["max_position_embeddings"])
GENERATION_CONFIG = dict(bos_token_id=CONFIG["bos_token_id"], eos_token_id=CONFIG["eos_token_id"],
                         pad_token_id=CONFIG["pad_token_id"], do_sample=False, max_new_tokens=260)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def main(build_dir, out_dir):
    build_dir, out_dir = pathlib.Path(build_dir), pathlib.Path(out_dir)
    saved = torch.load(build_dir / "checkpoint.pt")
    if saved["at"]["step"] != saved["steps"]:
        sys.exit(f"the run stopped at step {saved['at']['step']} of {saved['steps']}")
    tensors = {name: value.numpy().astype(numpy.float16) for name, value in saved["net"].items()}
    for name, value in tensors.items():
        if not numpy.isfinite(value).all():
            sys.exit(f"{name} does not fit float16")
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(out_dir / "model.safetensors"), metadata={"format": "pt"})
    (out_dir / "model.safetensors").chmod(0o644)  # the library writes it for the owner alone
    write_json(out_dir / "config.json", MODEL_CONFIG)
    write_json(out_dir / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(out_dir / "generation_config.json", GENERATION_CONFIG)
    shutil.copyfile(build_dir / "tokenizer.json", out_dir / "tokenizer.json")
    print(f"{out_dir}: {sum(value.size for value in tensors.values())} parameters, "
          f"{(out_dir / 'model.safetensors').stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])

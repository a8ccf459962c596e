"""Check a model folder with the libraries that read such folders: check_folder.py FOLDER"""
import json
import pathlib
import random
import struct
import sys

import numpy
from safetensors import safe_open
from tokenizers import Tokenizer

from documents import TASKS
from drills import DRILLS
from net import CONFIG, TinyLlama

MOST_BYTES = 8_000_000
TEXTS = 50


def check_weights(folder):
    path = folder / "model.safetensors"
    header_bytes, = struct.unpack("<Q", path.open("rb").read(8))
    assert path.stat().st_size <= MOST_BYTES and header_bytes % 8 == 0
    wanted = {name: tuple(value.shape) for name, value in TinyLlama(CONFIG).state_dict().items()}
    with safe_open(str(path), "numpy") as weights:
        assert set(weights.keys()) == set(wanted)
        for name in weights.keys():
            value = weights.get_tensor(name)
            assert value.dtype == numpy.float16 and value.shape == wanted[name], name
            assert numpy.isfinite(value).all(), name
    print(f"model.safetensors: {len(wanted)} tensors F16, shapes right, header {header_bytes} "
          f"bytes, file {path.stat().st_size} bytes")


def check_tokenizer(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    for name, key in (("<s>", "bos_token_id"), ("</s>", "eos_token_id"), ("<pad>", "pad_token_id")):
        assert tokenizer.token_to_id(name) == config[key]
    texts = ["", "  two  spaces\tand\n\nlines ", "Größe, 価格, 🙂 and it's 3.14!"]
    makers = list(TASKS.values()) + DRILLS
    while len(texts) < TEXTS:
        document = makers[len(texts) % len(makers)](random.Random(f"check {len(texts)}"))
        texts.append(document.prompt + document.answer)
        apart = tokenizer.encode(document.answer, add_special_tokens=False).ids
        assert tokenizer.encode(texts[-1]).ids == tokenizer.encode(document.prompt).ids + apart
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids[0] == config["bos_token_id"] and config["bos_token_id"] not in ids[1:]
        assert tokenizer.decode(ids) == text
    print(f"tokenizer.json: {len(texts)} texts come back unchanged, <s> first")


if __name__ == "__main__":
    check_weights(pathlib.Path(sys.argv[1]))
    check_tokenizer(pathlib.Path(sys.argv[1]))

# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors/model.safetensors with the format's own library; test_checkpoint reads it.

    pip install safetensors==0.8.0 numpy==2.4.6
    python3 make_safetensors.py

The values follow the index, so that the test states them without this file. BF16 has no numpy type:
its bits travel as U16 and only the header is changed.
"""
import json
import pathlib
import struct

import numpy as np
from safetensors.numpy import save

tensors = {
    "matrix": (np.arange(12, dtype=np.float32).reshape(3, 4) - 5.5) / 4,
    "half": (np.arange(6, dtype=np.float16).reshape(2, 3) - 2) / 8,
    "brain": np.array([0x3F80, 0xC000, 0x3E80, 0x7F80], dtype=np.uint16),  # 1, -2, 0.25, inf
    "bytes": np.arange(7, dtype=np.uint8).reshape(7, 1) * 3,
    "numbers": np.array([[-1, 2147483647]], dtype=np.int32),
    "wide": np.array([-(2**62)], dtype=np.int64),
    "double": np.array([1.5, -2.5]),
    "scalar": np.array(3.25, dtype=np.float32),
    "nothing": np.zeros((0, 5), dtype=np.float16),
}
blob = save(tensors, metadata={"format": "pt", "note": "read by test_checkpoint"})
length = struct.unpack("<Q", blob[:8])[0]
header = json.loads(blob[8 : 8 + length])
header["brain"]["dtype"] = "BF16"
text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
text += b" " * (-len(text) % 8)
path = pathlib.Path(__file__).parent / "safetensors" / "model.safetensors"
path.write_bytes(struct.pack("<Q", len(text)) + text + blob[8 + length :])

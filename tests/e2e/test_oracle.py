"""pmpd against the independent NumPy forward pass: dense models, and nested ones at every precision
they hold, tied and free, with padding."""
import json
import unittest

import numpy as np

from common import STORIES, TINY, Case, logits, main, nmse, pmpd, result
from numpy_llama import Model

IDS = [1, 300, 17, 4, 90, 260, 5, 33, 411, 7, 301, 12, 99, 64, 8, 2]


class Oracle(Case):
    def check(self, folder, nested_args, ids):
        dense = Model(folder).logits(ids)
        for backend in ("cpu", "cpu_ref"):
            self.assertLess(nmse(logits(folder, ids, "--kv", "f32", "--backend", backend), dense), 1e-9)
        nested = self.folder / "nested"
        pmpd("quantize", folder, nested, *nested_args)
        held = [int(b) for b in result("inspect", nested)["bits_read_per_weight"]]
        self.assertEqual(held, [2, 3, 4])
        errors = []
        for bits in held:
            want = Model(nested, bits).logits(ids)
            for backend in ("cpu", "cpu_ref"):
                got = logits(nested, ids, "--kv", "f32", "--bits", bits, "--backend", backend)
                self.assertLess(nmse(got, want), 1e-9, (bits, backend))
            errors.append(nmse(want, dense))
        self.assertGreater(errors[0], errors[1])
        self.assertGreater(errors[1], errors[2])

    def test_tiny_tied(self):
        self.check(TINY, ("--group", 64), IDS)

    def test_tiny_free_nested_head(self):
        self.check(TINY, ("--group", 128, "--alphas", "free", "--head-bits", "2,3,4"), IDS)

    @unittest.skipUnless(STORIES and STORIES.exists(), "no PMPD_TEST_DATA")
    def test_padding(self):
        """down_proj has 172 columns, which no group divides."""
        self.check(STORIES, ("--group", 32), IDS)

    def test_first_planes_are_the_lower_model(self):
        """A model that holds 2..4 read at 2 and 3 bits: only the first planes matter."""
        nested = self.folder / "nested"
        pmpd("quantize", TINY, nested)
        before = {b: logits(nested, IDS, "--bits", b) for b in (2, 3, 4)}
        weights = nested / "model.safetensors"
        data = bytearray(weights.read_bytes())
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + size])
        for name, entry in header.items():
            if name.endswith(".planes"):  # the last plane of every matrix inverted
                begin, end = (8 + size + o for o in entry["data_offsets"])
                first = begin + (end - begin) // entry["shape"][0] * 3
                data[first:end] = bytes(255 - b for b in data[first:end])
        weights.write_bytes(data)
        after = {b: logits(nested, IDS, "--bits", b) for b in (2, 3, 4)}
        for bits in (2, 3):
            np.testing.assert_array_equal(before[bits], after[bits])
        self.assertGreater(nmse(after[4], before[4]), 1e-3)


if __name__ == "__main__":
    main()

"""pmpd against the independent NumPy forward pass: dense models, and nested ones at every precision
they hold, tied and free, with padding."""
import json
import unittest

import h5py
import numpy as np

from common import NESTED_NMSE, STORIES, TINY, TOP, Case, logits, main, nmse, pmpd, result, write_config
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
                self.assertLess(nmse(got, want), NESTED_NMSE[backend], (bits, backend))
            errors.append(nmse(want, dense))
        self.assertGreater(errors[0], errors[1])
        self.assertGreater(errors[1], errors[2])

    def test_tiny_tied(self):
        self.check(TINY, ("--group", 64), IDS)

    def test_tiny_free_nested_head(self):
        self.check(TINY, ("--group", 128, "--alphas", "free", "--head-bits", "2,3,4"), IDS)

    def test_tail(self):
        """8 bits: a tail of four planes on top of 4."""
        nested = self.folder / "nested"
        pmpd("quantize", TINY, nested, "--tail", 8)
        dense, want = Model(TINY).logits(IDS), Model(nested, 8).logits(IDS)
        for backend in ("cpu", "cpu_ref"):
            got = logits(nested, IDS, "--kv", "f32", "--bits", 8, "--backend", backend)
            self.assertLess(nmse(got, want), NESTED_NMSE[backend], backend)
        self.assertLess(nmse(want, dense), nmse(Model(nested, 4).logits(IDS), dense) / 20)

    @unittest.skipUnless(STORIES and STORIES.exists(), "no PMPD_TEST_DATA")
    def test_padding(self):
        """down_proj has 172 columns, which no group divides."""
        self.check(STORIES, ("--group", 32), IDS)

    def test_kv_features(self):
        """Last layer's K and V after prefill, mean over heads, also gathered from tensor ranks."""
        model = Model(TINY)
        lines = (TOP / "experiments/tasks/tiny_mixed.jsonl").read_text().splitlines()[:2]
        prompts = [json.loads(line) for line in lines]
        for ranks in (1, 2):
            out = self.folder / f"features{ranks}"
            write_config(self.folder / "run.cfg", model__path=TINY, decode__max_new_tokens=2,
                         prompts__path=TOP / "experiments/tasks/tiny_mixed.jsonl", prompts__limit=2,
                         output__dir=out, output__kv_features=True, parallel__tensor_ranks=ranks)
            pmpd("run", self.folder / "run.cfg", ranks=ranks)
            with h5py.File(out / "run.h5") as run:
                offset = run["kv_features"]["offset"][:]
                self.assertEqual(run["kv_features"]["prompt"][:].tolist(), [0, 1])
                flat = run["kv_features"][next(k for k in run["kv_features"] if run["kv_features"][k].ndim == 3)][:]
            for i, prompt in enumerate(prompts):
                ids = result("generate", TINY, "--prompt", prompt["turns"][0], "-n", 1)["prompt_ids"]
                k, v = model.last_kv(ids)
                mine = flat[offset[i]:offset[i + 1]]
                self.assertEqual(mine.shape, (len(ids), 2, 32))
                self.assertLess(nmse(mine[:, 0], k.mean(1)), 1e-9)
                self.assertLess(nmse(mine[:, 1], v.mean(1)), 1e-9)

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

"""Tiny random models of every family against logits that Hugging Face transformers gave for them
(tests/golden/make_family_cases.py); the same models quantised, against the written definition."""
import json
import shutil
import unittest

import numpy as np

from common import NESTED_NMSE, TOP, Case, logits, main, nmse, pmpd, result
from numpy_llama import Model

GOLDEN = TOP / "tests" / "golden" / "families"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir())


def case(name):
    folder = GOLDEN / name
    return folder, json.loads((folder / "ids.json").read_text()), np.load(folder / "logits.npy")


class Families(Case):
    def test_reference(self):
        """One and two tensor ranks, both CPU backends, 96 positions each."""
        worst = {}
        for name in NAMES:
            folder, ids, want = case(name)
            for backend, ranks in (("cpu", 0), ("cpu", 2), ("cpu_ref", 0), ("cpu_ref", 2)):
                got = logits(folder, ids, "--kv", "f32", "--backend", backend, ranks=ranks)
                error = nmse(got, want)
                self.assertLessEqual(error, 1e-9, (name, backend, ranks))
                worst[name] = max(worst.get(name, 0), error)
        for name, error in worst.items():
            print(f"{name}: worst NMSE {error:.2g}")
        self.assertEqual(len({json.loads((GOLDEN / n / "config.json").read_text())["model_type"]
                              for n in NAMES}), 5)

    def test_every_part_counts(self):
        """Without what makes a case special its logits are others: the reference sees each part."""
        def changed(name, **members):
            folder, ids, want = case(name)
            copy = self.folder / "model"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**config, **members}))
            return nmse(logits(copy, ids, "--kv", "f32"), want)

        self.assertLess(changed("llama"), 1e-9)
        self.assertGreater(changed("llama-linear", rope_scaling=None), 1e-3)
        self.assertGreater(changed("llama-llama3", rope_scaling=None), 1e-3)
        self.assertGreater(changed("llama-llama3", rope_scaling={"type": "linear", "factor": 8.0}), 1e-3)
        self.assertGreater(changed("mistral", rope_theta=1e4), 1e-3)
        self.assertGreater(changed("stablelm", partial_rotary_factor=0.5), 1e-3)
        self.assertGreater(changed("stablelm", layer_norm_eps=0.1), 1e-6)
        self.assertGreater(changed("phi-gqa-gelu", hidden_act="gelu_new"), 1e-9)
        self.assertGreater(changed("phi", hidden_act="gelu"), 1e-9)

    def test_nested(self):
        """Planes and levels of every linear, biases as they were; 2, 3 and 4 bits."""
        for name in NAMES:
            folder, ids, want = case(name)
            dense = Model(folder).logits(ids)
            self.assertLessEqual(nmse(dense, want), 1e-9, name)  # the definition itself is right
            nested = self.folder / name
            pmpd("quantize", folder, nested, "--group", 32)
            self.assertEqual(result("inspect", nested)["family"], name.split("-")[0])
            errors = []
            for bits in (2, 3, 4):
                oracle = Model(nested, bits).logits(ids)
                for backend in ("cpu", "cpu_ref") if bits == 4 else ("cpu_ref",):
                    got = logits(nested, ids, "--kv", "f32", "--bits", bits, "--backend", backend)
                    self.assertLess(nmse(got, oracle), NESTED_NMSE[backend], (name, bits, backend))
                errors.append(nmse(oracle, want))
            self.assertGreater(errors[0], errors[2])

    def test_nested_head(self):
        """A nested head keeps its dense bias."""
        folder, ids, _ = case("phi")
        nested = self.folder / "nested"
        pmpd("quantize", folder, nested, "--group", 32, "--head-bits", "2,3,4")
        got = logits(nested, ids, "--kv", "f32", "--bits", 4, "--backend", "cpu_ref")
        self.assertLess(nmse(got, Model(nested, 4).logits(ids)), NESTED_NMSE["cpu_ref"])

    def test_levels_of_a_layer(self):
        """Levels name the family's own matrices."""
        folder, ids, _ = case("phi")
        nested = self.folder / "nested"
        pmpd("quantize", folder, nested, "--group", 32)
        base = logits(nested, ids, "--bits", "4")
        for role in ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "*"):
            self.assertGreater(nmse(logits(nested, ids, "--bits", f"4,1.{role}=2"), base), 1e-6, role)
        for role in ("gate_proj", "down_proj"):
            done = pmpd("logits", nested, "--ids", "1", "--out", self.folder / "x.npy", "--bits",
                        f"4,1.{role}=2", ok=False)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("expected q_proj, k_proj, v_proj, dense, fc1, fc2, * or head", done.stderr.decode())

    def test_prefill_and_decode(self):
        """The decode path scores what the prefill path scores, with one and two tensor ranks."""
        for name in ("llama-llama3", "qwen2", "stablelm-bias", "phi-gqa-gelu"):
            folder, ids, _ = case(name)
            text = self.folder / "ids.json"
            text.write_text(json.dumps({"ids": [ids], "first_scored_position": 1}))
            prefill = result("perplexity", folder, text, "--kv", "f32")
            for ranks in (0, 2):
                decode = result("perplexity", folder, text, "--kv", "f32", "--plan", "0:max", ranks=ranks)
                self.assertEqual(prefill["tokens"], decode["tokens"])
                self.assertAlmostEqual(prefill["nll"], decode["nll"], places=5)

    def test_refused(self):
        """What is not understood is refused by name."""
        for name, member, says in (
                ("mistral", {"sliding_window": 64}, "sliding_window is 64"),
                ("mistral", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
                ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window is 64"),
                ("qwen2", {"model_type": "qwen2_moe"}, "qwen2_moe"),
                ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
                ("phi", {"hidden_act": "relu"}, "relu"),
                ("phi", {"qk_layernorm": True}, "qk_layernorm"),
                ("phi", {"num_local_experts": 4}, "num_local_experts"),
                # a part that the weights have and config.json does not tell of, and the other way round
                ("stablelm-bias", {"use_qkv_bias": False}, "model.layers.0.self_attn.q_proj.bias"),
                ("llama-bias", {"mlp_bias": False}, "mlp.gate_proj.bias"),
                ("qwen2", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "q_proj.bias"),
                ("llama-linear", {"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias")):
            copy = self.folder / "model"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(GOLDEN / name, copy)
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**config, **member}))
            for arguments in (("logits", copy, "--ids", "1", "--out", self.folder / "x.npy"),
                              ("quantize", copy, self.folder / "nested", "--group", 32)):
                done = pmpd(*arguments, ok=False)
                error = done.stderr.decode()
                self.assertEqual(done.returncode, 1, (name, member, error))
                self.assertIn(says, error)
                self.assertEqual(error.count("pmpd: error: "), 1, error)
            self.assertFalse((self.folder / "nested").exists())


if __name__ == "__main__":
    main()

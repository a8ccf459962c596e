"""Policies that look at signals: what they decide for a prompt depends on the prompt, the dial and the settings
only. Every step's level, token, largest probability and probe compared as bits between numbers of tensor ranks,
replicas, threads and slots; a recorded run repeated without its policy; a classifier that does not belong to the
run."""
import json
import pathlib
import subprocess
import sys
import tempfile

import h5py
import numpy as np

from common import TINY, TOP, Case, main, pmpd, result, write_config

PROMPTS = ["Tobin: Hi Ruth, do you want to sell old books?", "The weather is", "1 + 1 =", "A", "Where is the library?",
           "I will bring a pillow."]
POLICIES = {
    "confidence": {"policy__window": 3, "policy__deviations": 0.0},
    "activation": {"policy__window": 3, "policy__deviations": 0.5},
    "error-feedback": {"policy__every": 2, "policy__divergence": 0.5},
    "learned": {},
}
WORLDS = [{"tensor": 1, "slots": 4}, {"tensor": 2, "slots": 3}, {"tensor": 1, "replicas": 2, "slots": 2, "threads": 2}]
COLUMNS = ("level", "token", "logprob", "max_prob", "probe_kl", "hidden_mean", "hidden_rms", "k_norm", "v_norm")
SHAPE = np.dtype([(n, "<i4") for n in ("head_dim", "n_kv_heads", "n_groups", "n_queries", "n_in", "n_hidden",
                                       "n_classes")])


def write_classifier(path, head_dim, digest, high, low, seed):
    """A classifier with random weights: which class it names is anybody's guess, but always the same."""
    random, hidden, classes = np.random.default_rng(seed), 8, 4
    arrays = {"query": (1, 2, head_dim), "norm_gain": (head_dim,), "norm_bias": (head_dim,), "w1": (hidden, head_dim),
              "b1": (hidden,), "w2": (classes, hidden), "b2": (classes,)}
    with h5py.File(path, "w") as file:
        file.attrs.update(format="pmpd classifier", format_version="1", kind="kv", model_digest=digest, high=high,
                          low=low)
        file["training"] = ""
        file["shape"] = np.array([(head_dim, 1, 1, 2, head_dim, hidden, classes)], SHAPE)
        file["class_at"] = np.array([0, 1 / 3, 2 / 3, 1])
        for name, shape in arrays.items():
            file[name] = random.normal(size=shape).astype("<f4")


class Policies(Case):
    @classmethod
    def setUpClass(cls):
        cls.shared = tempfile.TemporaryDirectory()
        cls.nested = pathlib.Path(cls.shared.name) / "nested"
        pmpd("quantize", TINY, cls.nested, "--bits", "2,3,4")

    @classmethod
    def tearDownClass(cls):
        cls.shared.cleanup()

    def setUp(self):
        super().setUp()
        (self.folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"id": f"p{i}", "turns": [text]}) + "\n" for i, text in enumerate(PROMPTS)))
        config = json.loads((TINY / "config.json").read_text())
        self.head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

    def write_run(self, name, policy, tensor=1, slots=1, threads=1, **more):
        settings = {"model__path": self.nested, "prompts__path": self.folder / "prompts.jsonl",
                    "output__dir": self.folder / name, "output__signals": True, "decode__max_new_tokens": 24,
                    "decode__context": 128,
                    "decode__stop_at_eos": False, "decode__slots": slots, "backend__threads": threads,
                    "parallel__tensor_ranks": tensor, "parallel__reproducible": True, "policy__name": policy,
                    "policy__prefill": "4", "policy__levels": "4 3 2"}
        write_config(self.folder / "run.cfg", **{**settings, **more})
        return self.folder / "run.cfg"

    def run_once(self, name, policy, replicas=1, tensor=1, **more):
        pmpd("run", self.write_run(name, policy, tensor=tensor, **more), ranks=tensor * replicas)
        with h5py.File(self.folder / name / "run.h5") as run:
            steps = np.sort(run["steps"][:], order=("prompt", "step"))
        return {k: np.ascontiguousarray(steps[k]).view(np.uint32)
                for k in COLUMNS}

    def test_decisions(self):
        digest = result("inspect", self.nested)["digest"]
        files = [self.folder / f"{pair}.h5" for pair in ("4-3", "3-2")]
        for i, file in enumerate(files):
            write_classifier(file, self.head_dim, digest, file.stem[0], file.stem[2], seed=i + 5)
        POLICIES["learned"]["policy__classifier"] = ":".join(map(str, files))
        for policy, settings in POLICIES.items():
            with self.subTest(policy=policy):
                runs = [self.run_once(f"{policy}-{i}", policy, **world, **settings) for i, world in enumerate(WORLDS)]
                for other in runs[1:]:
                    for name, values in runs[0].items():
                        np.testing.assert_array_equal(values, other[name], err_msg=f"{policy}: {name}")
                self.assertEqual(len(runs[0]["level"]), len(PROMPTS) * 23)
                self.assertGreater(len(set(runs[0]["level"])), 1, "one level only: nothing was decided")
                probed = ~np.isnan(runs[0]["probe_kl"].view(np.float32))
                self.assertEqual(probed.any(), policy == "error-feedback")
                for name in ("hidden_rms", "k_norm", "v_norm"):
                    self.assertGreater(runs[0][name].view(np.float32).min(), 0)
        # the plans of error-feedback by themselves: the same tokens, without a probe
        again = result("run", "--replay", self.folder / "error-feedback-0" / "run.h5", "--set",
                       f"output.dir={self.folder / 'again'}")
        self.assertEqual(again["compared"]["tokens"]["differ"], 0, again)
        self.assertEqual(again["compared"]["logprobs"]["differ"], 0, again)

    def test_oracle(self):
        """The better of two runs for each prompt, as answers and levels show."""
        switches = {"early": "0:4 3:2", "late": "0:4 12:2"}
        facts = self.folder / "facts.jsonl"
        for name, points in switches.items():
            pmpd("run", self.write_run(name, "static", policy__switches=points))
        texts = {name: {a["question_id"]: a["choices"][0]["turns"][0] for a in
                        map(json.loads, (self.folder / name / "answers.jsonl").read_text().splitlines())}
                 for name in switches}
        late = [i for i in texts["late"] if texts["late"][i] != texts["early"][i]][:2]
        self.assertEqual(len(late), 2, "too few answers depend on the switch")
        facts.write_text("".join(json.dumps({"id": i, "facts": [texts["late" if i in late else "early"][i]]}) + "\n"
                                 for i in texts["late"]))
        done = subprocess.run([sys.executable, TOP / "experiments/report/oracle.py", "--tasks", facts,
                               self.folder / "best.jsonl", self.folder / "late", self.folder / "early"],
                              check=True, stdout=subprocess.PIPE)
        self.assertIn(b"plans of 6 prompts from 2 runs", done.stdout)
        pmpd("run", self.write_run("best", "oracle", policy__oracle=str(self.folder / "best.jsonl")))
        found = [json.loads(line) for line in (self.folder / "best" / "answers.jsonl").read_text().splitlines()]
        for answer in found:
            i = answer["question_id"]
            self.assertEqual(answer["choices"][0]["turns"][0], texts["late" if i in late else "early"][i])
        with h5py.File(self.folder / "best" / "run.h5") as run:
            n_high = (run["steps"]["avg_bits"] == 4).sum()
        self.assertEqual(n_high, 12 * 2 + 3 * 4)

    def test_a_classifier_of_another_run(self):
        file = self.folder / "c.h5"
        for digest, high, dim, says in (("0" * 32, "4", self.head_dim, "0" * 32),
                                        ("", "3", self.head_dim, "high level"),
                                        ("", "4", self.head_dim + 1, "head dimension")):
            write_classifier(file, dim, digest, high, "2", seed=1)
            done = pmpd("run", self.write_run("bad", "learned", policy__classifier=str(file), policy__levels="4 2"),
                        ok=False)
            self.assertEqual(done.returncode, 2)
            self.assertIn(says, done.stderr.decode())
            self.assertFalse((self.folder / "bad" / "run.h5").exists())


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The joint quantiser against the others, on the embedded model: one table in Markdown.

    compare_quantisers.py [--pmpd build/pmpd] [--out results/quantisers] [--group 64] [--prompts 20]

Per method and precision: bits read per weight of the layers' linears, perplexity of tiny_test_ids.json
(each document by itself), the share of facts in the answers to the first test prompts of each task, with
a 95% interval, and answers equal to the reference. joint and gptq are calibrated on tiny_calib_ids.json;
joint (no data), rtn, bcq-greedy and kmeans look at the weights alone. gptq is not nested: one model for
each precision. The head stays F16. Finished runs are kept in --out and not made again. Python 3 alone;
about 15 minutes on two cores.
"""
import argparse
import json
import pathlib
import subprocess
import sys

TOP = pathlib.Path(__file__).resolve().parents[2]
TASKS = TOP / "experiments" / "tasks"
TINY = TOP / "experiments" / "tiny"
CALIB = ["--calib", TASKS / "tiny_calib_ids.json"]
METHODS = {  # name: (options, nested)
    "joint tied": (CALIB, True),
    "joint free": ([*CALIB, "--alphas", "free"], True),
    "joint tied, no data": ([], True),
    "rtn": (["--method", "rtn"], True),
    "bcq-greedy": (["--method", "bcq-greedy"], True),
    "kmeans": (["--method", "kmeans"], True),
    "gptq": ([*CALIB, "--method", "gptq"], False),
}
sys.path.insert(0, str(TASKS))
import score_facts  # noqa: E402


def run(*args):
    done = subprocess.run([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, args))}\n{done.stderr.decode(errors='replace')}")
    return done.stdout.decode()


def cached(path, make):
    """The JSON at path, made when it is not there."""
    if not path.exists():
        path.write_text(json.dumps(make(), indent=1))
    return json.loads(path.read_text())


class Comparison:
    def __init__(self, arguments):
        self.a, self.out = arguments, pathlib.Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows = []
        for task in ("summary", "translation", "story"):
            rows = score_facts.read_jsonl(TASKS / f"tiny_{task}.jsonl")
            self.rows += [row for row in rows if row["split"] == "test"][:arguments.prompts]
        self.prompts = self.out / "prompts.jsonl"
        self.prompts.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def quantize(self, name, *options):
        folder = self.out / name
        return folder, cached(self.out / f"{name}.json", lambda: json.loads(run(
            self.a.pmpd, "quantize", TINY, folder, "--group", self.a.group, "--json", "--force", *options)))

    def score(self, name, model, bits):
        """Perplexity, facts and exact answers of one model at one precision."""
        def make():
            out = self.out / f"run-{name}"
            text = json.loads(run(self.a.pmpd, "perplexity", model, TASKS / "tiny_test_ids.json", "--bits", bits,
                                  "--json"))
            settings = [f"model.path={model}", f"output.dir={out}", f"prompts.path={self.prompts}",
                        "decode.slots=8", "policy.name=fixed", f"policy.prefill={bits}", f"policy.level={bits}"]
            run(self.a.pmpd, "run", TOP / "configs" / "tiny.cfg", *(w for s in settings for w in ("--set", s)))
            answers = {row["question_id"]: row["choices"][0]["turns"][0]
                       for row in score_facts.read_jsonl(out / "answers.jsonl")}
            return dict(perplexity=text["perplexity"], **score_facts.score(answers, self.rows)["all"])
        return cached(self.out / f"score-{name}.json", make)

    def line(self, method, bits, read, s):
        print(f"| {method} | {bits} | {read} | {s['perplexity']:.4f} | "
              f"{s['facts']:.1f} [{s['facts_low']:.1f}, {s['facts_high']:.1f}] | {s['exact']:.0f} |", flush=True)

    def table(self):
        print(f"groups of {self.a.group}, {len(self.rows)} prompts\n\n"
              "| method | bits | bits read per weight | perplexity | facts, percent | exact, percent |\n"
              "| --- | --- | --- | --- | --- | --- |")
        self.line("float16", 16, "16.000", self.score("float16", TINY, "max"))
        for method, (options, nested) in METHODS.items():
            name = method.replace(",", "").replace(" ", "-")
            if nested:
                folder, report = self.quantize(name, *options)
            for bits in (4, 3, 2):
                if not nested:
                    folder, report = self.quantize(f"{name}-{bits}", "--bits", bits, *options)
                read = report["layers"]["read_bits_per_weight"][str(bits)]
                self.line(method, bits, f"{read:.3f}", self.score(f"{name}-{bits}-bits", folder, bits))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pmpd", default=TOP / "build" / "pmpd")
    parser.add_argument("--out", default="results/quantisers")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=20, help="test prompts per task")
    Comparison(parser.parse_args()).table()


if __name__ == "__main__":
    main()

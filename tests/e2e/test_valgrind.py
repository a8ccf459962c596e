"""Two ranks under valgrind, as tensor ranks and as replicas: no invalid access, no decision on memory that
nobody wrote, nothing lost. Needs valgrind and a build without sanitizers."""
import json
import pathlib
import shutil
import subprocess
import sys
import unittest

from common import PMPD, TINY, TOP, Case, environment, main, pmpd, read_run, write_config

SUPPRESSIONS = [TOP / "tests" / "valgrind.supp"] + \
    [p for p in [pathlib.Path("/usr/share/openmpi/openmpi-valgrind.supp")] if p.exists()]
PLUGINS = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,vader", "OMPI_MCA_osc": "^ucx",
           "OMPI_MCA_mtl": "^ofi,psm,psm2"}  # fewer of Open MPI's own, half the time


@unittest.skipUnless(shutil.which("valgrind"), "no valgrind")
@unittest.skipIf(b"__asan_init" in pathlib.Path(PMPD).read_bytes(), "a build with sanitizers")
class Valgrind(Case):
    def run_checked(self, model, **settings):
        config, out, logs = self.folder / "run.cfg", self.folder / "out", self.folder / "logs"
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir()
        write_config(config, model__path=model, prompts__path=self.folder / "prompts.jsonl", output__dir=out,
                     output__kv_features=True, output__signals=True, decode__max_new_tokens=5, decode__slots=2,
                     decode__prefill_chunk=4, decode__context=64, backend__threads=2, policy__prefill="4",
                     policy__name="error-feedback", policy__levels="4 2", policy__every=2, **settings)
        command = ["mpirun", "-n", "2", "valgrind", "-q", "--error-exitcode=9", "--leak-check=full",
                   "--show-leak-kinds=definite", "--errors-for-leak-kinds=definite", "--num-callers=40",
                   f"--log-file={logs}/%p"] + [f"--suppressions={p}" for p in SUPPRESSIONS]
        done = subprocess.run(command + [PMPD, "run", str(config)], env={**environment(), **PLUGINS}, timeout=600,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        found = "".join(p.read_text(errors="replace") for p in logs.iterdir())
        self.assertEqual(found, "")
        self.assertEqual(done.returncode, 0, done.stderr.decode(errors="replace"))
        self.assertEqual(len(list(logs.iterdir())), 2)
        self.assertEqual(len(read_run(out)), 4)

    def test_two_ranks(self):
        dense, nested = self.folder / "dense", self.folder / "nested"
        subprocess.run([sys.executable, TOP / "experiments" / "random_model.py", "64,96,2,4,2,1536", dense],
                       check=True, stdout=subprocess.DEVNULL)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / file, dense)
        pmpd("quantize", dense, nested, "--group", 32)
        (self.folder / "prompts.jsonl").write_text("".join(
            json.dumps({"turns": turns}) + "\n" for turns in (["The weather is", "and"], ["A"], ["Once upon a time"])))
        self.run_checked(nested, parallel__tensor_ranks=2, parallel__reproducible=True)
        self.run_checked(nested, decode__temperature=1.5, decode__top_p=0.9)


if __name__ == "__main__":
    main()

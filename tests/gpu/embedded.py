"""The embedded model on a backend, teacher-forced on cpu_ref's own greedy tokens, against cpu_ref:
arg-max equal wherever the two largest logits of cpu_ref are further apart than 1 % of the logits'
standard deviation; and the same tokens from run to run. Needs Python only.
usage: embedded.py PMPD MODEL BACKEND"""
import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile

PROMPTS = ["Task: story\n", "1 + 1 =", "Task: facts\n"]
N_NEW = 48


def call(*args):
    done = subprocess.run([str(a) for a in args], stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, args))}: exit {done.returncode}\n{done.stderr.decode(errors='replace')}")
    return done.stdout


def read_npy(path):
    """The rows of a two-dimensional float32 array."""
    data = path.read_bytes()
    size = struct.unpack("<H", data[8:10])[0]
    header = eval(data[10:10 + size].decode(), {"__builtins__": {}})  # noqa: S307: NumPy's own text form
    rows, cols = header["shape"]
    values = struct.unpack(f"<{rows * cols}f", data[10 + size:])
    return [values[r * cols:(r + 1) * cols] for r in range(rows)]


def compare(want, got):
    """(clear positions, of which equal, normalised squared error)"""
    clear = equal = 0
    error = power = 0.0
    for w, g in zip(want, got):
        order = sorted(range(len(w)), key=w.__getitem__)
        mean = sum(w) / len(w)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in w) / len(w))
        error += sum((a - b) ** 2 for a, b in zip(w, g))
        power += sum(v * v for v in w)
        if w[order[-1]] - w[order[-2]] > 0.01 * deviation:
            clear += 1
            equal += max(range(len(g)), key=g.__getitem__) == order[-1]
    return clear, equal, error / power


def main():
    pmpd, model, backend = pathlib.Path(sys.argv[1]).absolute(), sys.argv[2], sys.argv[3]
    bad = False
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        call(pmpd, "quantize", model, folder / "nested")
        print(f"{'model':8} {'bits':>4} {'positions':>9} {'clear':>6} {'equal':>6} {'NMSE':>9}  run to run")
        for name, path, bits in [("dense", model, [])] + [("nested", folder / "nested", ["--bits", b]) for b in "432"]:
            n = n_clear = n_equal = 0
            worst, repeats = 0.0, True
            for prompt in PROMPTS:
                said = json.loads(call(pmpd, "generate", path, "--prompt", prompt, "-n", N_NEW, "--backend",
                                       "cpu_ref", "--kv", "f16", "--json", *bits))
                ids = ",".join(map(str, said["prompt_ids"] + said["ids"]))
                for who in ("cpu_ref", backend):
                    call(pmpd, "logits", path, "--ids", ids, "--out", folder / f"{who}.npy", "--backend", who,
                         "--kv", "f16", *bits)
                want = read_npy(folder / "cpu_ref.npy")
                clear, equal, error = compare(want, read_npy(folder / f"{backend}.npy"))
                n, n_clear, n_equal = n + len(want), n_clear + clear, n_equal + equal
                worst = max(worst, error)
                again = [json.loads(call(pmpd, "generate", path, "--prompt", prompt, "-n", N_NEW, "--backend", backend,
                                         "--temperature", "0.8", "--json", *bits))["ids"] for _ in range(2)]
                repeats = repeats and again[0] == again[1]
            print(f"{name:8} {bits[-1] if bits else 16:>4} {n:9} {n_clear:6} {n_equal:6} {worst:9.2g}  "
                  f"{'same' if repeats else 'DIFFERS'}")
            bad = bad or n_clear != n_equal or not repeats or not worst < 1e-5
    sys.exit(1 if bad else 0)


main()

"""pmpd bench: every subcommand on a toy shape gives the promised keys with finite numbers; the bytes of a step
against arithmetic from the shape; the shares of a profile add up. Nothing is said about speed."""
import math

from common import TINY, Case, main, pmpd, result

LAYERS, HIDDEN, HEADS, KV, DIM, FFN, VOCAB = 2, 256, 4, 2, 64, 640, 512  # the shape "tiny"


def weight_bytes(bits, group, free=False):
    """Planes, and per group of a row a scale (free: one per plane) and an offset of two bytes each."""
    shapes = [(HEADS * DIM, HIDDEN), (KV * DIM, HIDDEN), (KV * DIM, HIDDEN), (HIDDEN, HEADS * DIM),
              (FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)] * LAYERS + [(VOCAB, HIDDEN)]
    values = bits + 1 if free else 2
    return sum(rows * (bits * cols // 8 + 2 * values * cols // group) for rows, cols in shapes)


def planes(bits):
    return weight_bytes(bits, 1 << 30)


def kv_bytes(context, steps, slots, element):
    """Of the step in the middle of a block: it reads its own row, too."""
    return slots * (context + steps // 2 + 1) * 2 * LAYERS * KV * DIM * element


def bench(word, *args, **kwargs):
    return result("bench", word, "--probe", 2, *args, **kwargs)


class Bench(Case):
    def check_finite(self, value, where="root"):
        if isinstance(value, dict):
            for key, inner in value.items():
                self.check_finite(inner, f"{where}.{key}")
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                self.check_finite(inner, f"{where}[{i}]")
        elif isinstance(value, float):
            self.assertTrue(math.isfinite(value), where)

    def check_decode_row(self, row, out):
        for key in ("bits", "tok_s", "tok_s_min", "tok_s_max", "gb_s", "bandwidth_gb_s", "bandwidth_fraction",
                    "bandwidth_fraction_min", "bandwidth_fraction_max", "threads", "context", "slots", "shape", "isa"):
            self.assertIn(key, row)
        self.assertLessEqual(row["tok_s_min"], row["tok_s"])
        self.assertLessEqual(row["tok_s"], row["tok_s_max"])
        self.assertGreater(row["bandwidth_gb_s"], 0)
        size = row["weight_bytes"] + row["kv_bytes"]
        self.assertAlmostEqual(row["gb_s"], 1e-9 * size * row["tok_s"] / row["slots"], delta=1e-6 * row["gb_s"])
        self.check_finite(out)

    def test_service(self):
        for ranks in (0, 3):
            out = result("bench", "service", "--replicas", 5, "--leases", 60, "--pause", "0,2", "--tokens", 9,
                         ranks=ranks)
            self.assertEqual([(r["pause_ms"], r["replicas"], r["leases"]) for r in out["rows"]],
                             [(0, 5, 60), (2, 5, 60)])
            for row in out["rows"]:
                self.assertGreater(row["decisions_s"], 0)
                self.assertLessEqual(row["plan_p50_us"], row["plan_p99_us"])
                self.assertLessEqual(row["plan_p99_us"], row["plan_max_us"])
                self.assertGreater(row["lease_p50_us"], 0)
                self.assertTrue(1 <= row["mean_batch"] <= row["largest_batch"] <= 5)
            self.check_finite(out)
        for words in (("--replicas", 0), ("--leases", 0), ("--pause", "-1"), ("--bits", 2)):
            self.assertNotEqual(pmpd("bench", "service", *words, ok=False).returncode, 0)
        done = pmpd("bench", "service", "--dir", "/nowhere", ok=False)
        self.assertIn(b"no folder can be made in /nowhere", done.stderr)

    def test_decode(self):
        out = bench("decode", "--shape", "tiny", "--bits", "2,4", "--context", "16,40", "--slots", "2,1",
                     "--steps", "5", "--rounds", "2", "--threads", "1,2", "--profile", "--isa", "scalar")
        names = ("threads", "context", "slots", "bits")
        self.assertEqual([tuple(r[n] for n in names) for r in out["rows"]],
                         [(t, c, s, b) for t in (1, 2) for c in (16, 40) for s in (2, 1) for b in (2, 4)])
        for row in out["rows"]:
            self.check_decode_row(row, out)
            self.assertEqual(row["weight_bytes"], weight_bytes(row["bits"], 64))
            self.assertEqual(row["kv_bytes"], kv_bytes(row["context"], 5, row["slots"], 2))
            self.assertEqual(row["steps"], 10)
            self.assertEqual(row["isa"], "scalar")
            mine, (total,) = ([p for p in out[key] if all(p[n] == row[n] for n in names)]
                              for key in ("profile", "profile_sum"))
            shares = sum(p["share"] for p in mine) + total["comm_share"]
            self.assertAlmostEqual(shares, 100, delta=0.01)
            self.assertAlmostEqual(sum(p["us"] for p in mine), total["step_us"] * (1 - total["comm_share"] / 100),
                                   delta=1e-3 * total["step_us"])
            nested = [p for p in mine if p["op"] == "matmul_nested"]
            self.assertAlmostEqual(sum(p["share"] for p in nested), total["nested_share"], delta=0.01)
            # 7 matrices of a layer and the head; what they read in all is what the pass counted
            self.assertAlmostEqual(sum(p["calls"] for p in nested), 7 * LAYERS + 1)
            read = sum(p["gb_s"] * p["us"] for p in nested) * 1e3
            self.assertAlmostEqual(read, row["weight_bytes"], delta=1e-3 * row["weight_bytes"])
            parts = ("nested_share", "attention_share", "comm_share", "rest_share")
            self.assertAlmostEqual(sum(total[p] for p in parts), 100, delta=0.01)
            self.assertGreaterEqual(min(p["share"] for p in mine if p["op"] != "decoder"), 0)
        for row in out["memory"]:
            self.assertAlmostEqual(row["embed_mb"], 2e-6 * VOCAB * HIDDEN, places=6)
            # levels of both precisions, planes of the higher one
            self.assertAlmostEqual(row["planes_mb"], 1e-6 * planes(4), places=6)
            self.assertAlmostEqual(row["levels_mb"], 1e-6 * (weight_bytes(4, 64) - planes(4) + weight_bytes(2, 64)
                                                             - planes(2)), places=6)
            self.assertAlmostEqual(row["kv_mb"], 3e-6 * (40 + 5 + 1 + 1) * 2 * LAYERS * KV * DIM * 2, places=6)
            self.assertGreater(row["resident_mb"], row["planes_mb"])

    def test_ranks_and_levels(self):
        """A replica of two ranks reads together what one rank would; free levels, another group, f32 cache."""
        out = bench("decode", "--shape", "tiny", "--bits", "3", "--context", "0", "--steps", "2",
                     "--rounds", "1", "--threads", "1", "--levels", "free", "--group", "32", "--kv", "f32",
                     "--temperature", "0.8", ranks=2)
        row, = out["rows"]
        self.check_decode_row(row, out)
        self.assertEqual((row["ranks"], row["group"]), (2, 32))
        self.assertEqual(row["weight_bytes"], weight_bytes(3, 32, free=True))
        self.assertEqual(row["kv_bytes"], kv_bytes(0, 2, 1, 4))

    def test_folder_and_prefill(self):
        out = bench("prefill", "--shape", TINY, "--bits", "2,3", "--tokens", "5,20", "--chunk", "8",
                     "--rounds", "1", "--threads", "2")
        self.assertEqual([(r["tokens"], r["bits"]) for r in out["rows"]], [(5, 2), (5, 3), (20, 2), (20, 3)])
        self.check_finite(out)
        out = bench("prefill", "--shape", "tiny", "--bits", "2", "--tokens", "10", "--rounds", "1",
                     "--threads", "1")
        row, = out["rows"]
        linears = LAYERS * (2 * HEADS * DIM * HIDDEN + 2 * KV * DIM * HIDDEN + 3 * FFN * HIDDEN)
        self.assertAlmostEqual(row["gmac_s"], 1e-9 * (10 * linears + VOCAB * HIDDEN) * row["tok_s"] / 10,
                               delta=1e-6 * row["gmac_s"])

    def test_switch(self):
        out = bench("switch", "--shape", "tiny", "--from", "4", "--to", "2,3", "--rounds", "3",
                     "--context", "4", "--threads", "1")
        self.assertEqual([(r["from"], r["to"]) for r in out["rows"]], [(4, 2), (4, 3)])
        for row in out["rows"]:
            self.assertTrue(0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"])
        self.check_finite(out)

    def test_ops(self):
        out = bench("ops", "--shape-list", "96x1024,32x96", "--bits", "2,3", "--tokens", "1,3", "--rounds",
                     "1", "--threads", "1")
        self.assertEqual([(r["rows"], r["cols"], r["tokens"], r["bits"]) for r in out["rows"]],
                         [(rows, cols, n, b) for rows, cols in ((96, 1024), (32, 96)) for n in (1, 3)
                          for b in (2, 3, 16)])
        for row in out["rows"]:
            rows, cols, bits = row["rows"], row["cols"], row["bits"]
            padded = -(-cols // 64) * 64
            size = rows * cols * 2 if bits == 16 else rows * (bits * padded // 8 + 4 * padded // 64)
            self.assertEqual(row["bytes"], size)
            self.assertAlmostEqual(row["gb_s"], 1e-3 * size / row["us"], delta=1e-6 * row["gb_s"])
        self.check_finite(out)

    def test_text(self):
        text = pmpd("bench", "decode", "--probe", 2, "--shape", "tiny", "--bits", "4", "--steps", "1", "--rounds", "1", "--threads",
                    "1", "--share").stdout.decode()
        self.assertRegex(text, r"share (not )?raised")
        title, row = text.splitlines()[2:4]
        self.assertEqual(len(title), len(row))

    def test_refused(self):
        for args, says in ((("decode", "--shape", "no-such"), "vicuna-7b"),
                           (("decode", "--bits", "2,9"), "from 1 to 8"),
                           (("decode", "--bits", "2,2"), "twice"),
                           (("decode", "--group", "48"), "32, 64 or 128"),
                           (("decode", "--shape", "vicuna-7b", "--slots", "256", "--context", "1000000"), "GB are free"),
                           (("ops", "--shape", "tiny", "--rows", "3"), "exclude"),
                           (("ops", "--shape-list", "3x"), "ROWSxCOLS"),
                           (("switch", "--bits", "3"), "takes no --bits"),
                           (("sing",), "expected ops")):
            done = pmpd("bench", *args, ok=False)
            self.assertEqual(done.returncode, 2, args)
            self.assertIn(says, done.stderr.decode())
        for word in ((), ("ops",)):
            self.assertIn("usage: pmpd bench", pmpd("bench", *word, "--help").stdout.decode())


if __name__ == "__main__":
    main()

"""pmpd tune high: the lowest precision that loses nothing, from perplexities that pmpd perplexity
prints too."""
import json

from common import TINY, TOP, Case, main, pmpd, result


class Tune(Case):
    def setUp(self):
        super().setUp()
        rows = json.loads((TOP / "experiments" / "tasks" / "tiny_test_ids.json").read_text())["ids"][:12]
        self.text = self.folder / "rows.json"
        self.text.write_text(json.dumps({"ids": rows}))
        self.nested = self.folder / "nested"
        pmpd("quantize", TINY, self.nested)

    def test_high(self):
        def perplexity(model, *args):
            return result("perplexity", model, self.text, *args)["perplexity"]

        reference = perplexity(TINY)
        each = {b: perplexity(self.nested, "--bits", b) for b in (2, 3, 4)}
        for ranks in (0, 2):
            for loss in ("0.2%", "1%", "0.1", "500%"):
                share = float(loss[:-1]) / 100 if loss.endswith("%") else float(loss)
                good = [b for b in (2, 3, 4) if all(each[c] <= reference * (1 + share) for c in (2, 3, 4) if c >= b)]
                got = result("tune", "high", self.nested, "--text", self.text, "--loss", loss, "--reference", TINY,
                             ranks=ranks)
                self.assertEqual(got["high"], min(good) if good else None, loss)
                self.assertEqual(got["low"], min(good) - 1 if good and min(good) > 2 else None, loss)
                for row in got["precisions"]:
                    # two ranks add up in another order, and 8-bit activations make more of it
                    self.assertLess(abs(row["perplexity"] / each[row["bits"]] - 1), 2e-3 if ranks else 1e-6)

    def test_without_reference(self):
        got = result("tune", "high", self.nested, "--text", self.text, "--loss", "0")
        self.assertEqual(got["reference_perplexity"], got["precisions"][-1]["perplexity"])

    def test_refused(self):
        for args, says in ((("high", TINY, "--text", self.text), "not nested"),
                           (("low", TINY, "--text", self.text), "found \"low\""),
                           (("high", self.nested), "needs --text"),
                           (("high", self.nested, "--text", self.text, "--loss", "much"), "found \"much\"")):
            done = pmpd("tune", *args, ok=False)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn(says, done.stderr.decode())


if __name__ == "__main__":
    main()

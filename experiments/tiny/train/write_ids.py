"""tiny_test.txt and tiny_calib.txt as token ids, one row per document after the start token, for
`pmpd perplexity` and `pmpd quantize --calib`: write_ids.py TOKENIZER_JSON TASKS_DIR"""
import json
import pathlib
import sys

from tokenizers import Tokenizer


def main(tokenizer_path, tasks_dir):
    tokenizer = Tokenizer.from_file(tokenizer_path)
    tasks_dir = pathlib.Path(tasks_dir)
    for name in ("tiny_test", "tiny_calib"):
        texts = (tasks_dir / f"{name}.txt").read_text().rstrip("\n").split("\n\n")
        rows = [tokenizer.encode(text).ids for text in texts]
        out = tasks_dir / f"{name}_ids.json"
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        out.write_text('{"first_scored_position": 1, "ids": [\n' + lines + "\n]}\n")
        print(f"{out}: {len(rows)} rows, {sum(map(len, rows))} ids")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

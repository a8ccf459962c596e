"""Write the task files, byte for byte the same each time: write_tasks.py OUT_DIR"""
import json
import pathlib
import sys

from documents import SPLIT_SIZES, TASKS, calibration_text, perplexity_text, split

MIXED_PER_TASK = 8  # first test prompts of each task in tiny_mixed.jsonl


def lines(name, task):
    for number, document in enumerate(split(name, task)):
        yield json.dumps(dict(
            id=f"{task}-{name}-{number:03d}", task=task, split=name, turns=[document.prompt],
            reference=document.answer, facts=list(document.facts), template="none"))


def write(path, rows):
    path.write_text("".join(row + "\n" for row in rows))
    print(f"{path}: {len(rows)} lines")


def main(out_dir):
    out_dir = pathlib.Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    mixed = []
    for task in TASKS:
        write(out_dir / f"tiny_{task}.jsonl",
              [row for name in SPLIT_SIZES for row in lines(name, task)])
        mixed += list(lines("test", task))[:MIXED_PER_TASK]
    write(out_dir / "tiny_mixed.jsonl", mixed)
    for name, documents in (("tiny_test.txt", perplexity_text()), ("tiny_calib.txt", calibration_text())):
        texts = [document.prompt + document.answer for document in documents]
        (out_dir / name).write_text("\n\n".join(texts) + "\n")
        print(f"{out_dir / name}: {len(texts)} documents")


if __name__ == "__main__":
    main(sys.argv[1])

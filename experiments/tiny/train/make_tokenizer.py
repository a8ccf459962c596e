"""Train the byte-level BPE and write tokenizer.json: make_tokenizer.py OUT_DIR"""
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from documents import TrainingStream

VOCABULARY = 1536
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]  # ids 0 to 3
SEED, DOCUMENTS = 11, 6000


def main(out_dir):
    stream = TrainingStream(SEED)
    texts = [document.prompt + document.answer
             for document in stream.pool(0, DOCUMENTS, drill_share=.1, short_share=.2)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIALS,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  min_frequency=2, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIALS.index("<s>"))])
    if tokenizer.get_vocab_size() != VOCABULARY:
        sys.exit(f"vocabulary has {tokenizer.get_vocab_size()} tokens, expected {VOCABULARY}")
    path = pathlib.Path(out_dir) / "tokenizer.json"
    tokenizer.save(str(path))
    print(f"{path}: {VOCABULARY} tokens from {len(texts)} documents, {stream.skipped} held-out "
          "documents skipped")


if __name__ == "__main__":
    main(sys.argv[1])

"""Write the tokenizer fixtures: make_tokenizer_cases.py OUT_DIR   (OUT_DIR: tests/golden/tokenizer)

Needs `pip install tokenizers==0.23.3 sentencepiece==0.2.0`, which are the independent implementations
that test_tokenizer is held against. Tiny tokenizers are trained on the text below, one for each kind
of file that core/tokenizer reads; cases.json holds awkward texts, their ids and what the ids decode to.
SPDX-License-Identifier: Apache-2.0
"""
import io
import json
import pathlib
import random
import sys

import sentencepiece
import tokenizers
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors, trainers)

VERSION = "0.23.3"
SPM_VERSION = "0.2.0"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

TEXT = """
The lighthouse keeper's daughter didn't sleep. She'd counted 1234 waves, then 5678 more, and
we're told she'll count again; I've never seen anyone so patient. "You're late," said the gull.
Rain fell on the harbour wall, on the nets, on the wonderful wonderful wonderful painted boats.
    def count(waves):
        return sum(1 for wave in waves if wave > 10)  # four spaces, eight spaces
Der Fluß fließt früh über die Brücke; die Vögel überqueren ihn täglich. Ça va très bien, à bientôt.
Старый маяк стоит на берегу моря. Чайки кричат над водой, и ветер поёт.
灯台の番人は海を見ていた。海は静かだった。老灯塔在海边，海浪很安静。
파도가 바위에 부딪힌다. 바다는 조용하다.
पुराना दीपस्तंभ समुद्र के किनारे खड़ा है। लहरें शांत हैं।
The sea, the sea, the sea! 100 000 drops; 3.14159; 2024-01-31; x=y+z; a_b; e-mail@example.org
""" * 3

CURATED = [
    "", " ", "  ", "   ", "a", "ab", " a", "a ", "  a  b   c    ", "\n", "\n\n", "\r\n", "\r\n\r\n",
    "\t", "\t\t", " \t ", " \n ", "\n \n", "a\nb", "a\n\nb", "a \n b", "a\r\nb", "   \n   x",
    "The lighthouse keeper's daughter didn't sleep.", "I'm you're he'd we'll they've it's can't",
    "I'M YOU'RE HE'D WE'LL THEY'VE IT'S CAN'T", "'s 't 're", "''s", "don''t", "’s ’t", "'\u017fa",
    "O'Reilly's 'quoted' ''text''", "1", "12", "123", "1234", "12345678901234567890", "1,234.56",
    "a1b2c3", "x=1+2*3/4-5%6", "３４５", "²³¹", "Ⅳ Ⅻ", "½ ⅓", "٣٤٥", "१२३",
    "naïve café — ünï", "Straße ß ẞ", "Ça va très bien", "œuvre Œ æ Æ ø Ø", "ŁÓDŹ łódź",
    "e\u0301", "cafe\u0301", "a\u0323\u0301", "a\u0301\u0323", "\u0301", " \u0301a", "n\u0303o",
    "Å \u212b \u2126", "\u1100\u1161\u11a8", "가\u11a8", "\uac00\uac01", "\u0928\u093c", "लड़का",
    "\u0958", "\ufb1d \ufb2a", "\u0344", "\u2000x\u2001y", "\u037e", "ﬁ ﬂ ﬀ",
    "日本語", "日本語 テスト", "海は静かだった。", "老灯塔在海边，", "中文，标点！", "한국어 파도가",
    "Старый маяк", "Чайки кричат", "Ελληνικά ΣΊΣΥΦΟΣ", "עברית שלום", "العربية مَرْحَبًا", "ไทย ภาษา",
    "हिन्दी दीपस्तंभ", "தமிழ் மொழி", "বাংলা", "ქართული", "ᏣᎳᎩ", "አማርኛ", "ᠮᠣᠩᠭᠣᠯ", "a\u180eb \u180e",
    "😀", "😀😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "❤️", "1️⃣", "🇩🇪🇫🇷", "a😀b", " 😀 ", "𝒳𝓎𝓏 𝟙𝟚", "𐍈 𠜎",
    "\u00a0", "a\u00a0b", "\u00a0\u00a0a", "a\u2003b", "a\u3000b", "\u3000\u3000海", "a\u200bb",
    "\ufeffa", "a\u00adb", "\u2028", "a\u2029b", "a\u0085b", "\u1680 x", "\u202fx\u205fy",
    "\x01", "\x02\x1f", "a\x0bb\x0cc", "\x7f", "\x80\x9f", "\x1b[31mred\x1b[0m", "\ufffd", "\uffff",
    "\U0010ffff", "\ue000", "▁", "▁▁", " ▁ ", "a▁b", "▁a", "<0x41>", "<0x00>", "<unk>", "Ġ", "ĠaĊ",
    "ÃÂÃÂ", "é è ê ë", "!!!", "...", "…", "?!?!", "--- ***", "#include <stdio.h>", "{}[]()<>",
    "\"'\"'", "\\n \\t", "http://example.org/a?b=c&d=e#f", "e-mail@example.org", "C:\\Users\\x",
    "    def count(waves):\n        return sum(1)  # x\n", "\tif x:\n\t\treturn\n\n\n", "a" * 40,
    " " * 37, " " * 37 + "x", "\n" * 9, "ab" * 30, "wonderful", " wonderful", "wonderful wonderful",
    "wonder", "wonderfully", "_", "__init__", "snake_case_name", "camelCaseName", "ALLCAPS", "ǅ ǈ",
    "ʻokina", "l·l", "x\u0332y", "a\u20dd", "\u0e33", "\u0300\u0301\u0302", "K \u212a", "'ſ", "\u0130i",
    "<s>", "</s>", "<s>Hello", "Hello<s>", "Hello <s> world", "<s><s></s>", " <s> ", "<S>", "< s>",
    "<|end|>", "a<|end|>b", "a <|end|> b", "a<|end|>\n b", "<|end|><|end|>", "<|end|", "|end|>",
    "<|end|>>", "<<|end|>", "<|endless|>", "a<|endless|>b", "<|pad|>", "a  <|pad|>  b", "\u3000<|pad|>\tb",
    "a\n<|pad|>\n\nb", "<|pad|><|pad|>", "x<|pad|> <|pad|>y", "<|pad|>   ", "   <|pad|>",
    "New York", "in New York, NY", "New  York", "NewYork", "new york", "New York City", "New Yorkshire",
    "zaž", "aéb", "éclair", "cafe\u0301 éclair", "xéclair", "e\u0301clair",
]
ALPHABETS = [
    "abcdefghij ABC", "the sea wonderful '  ", "0123456789., ", " \n\t\r", "éèüßñçøå", "абвгд маяк",
    "海灯台静か。，！", "파도바다가", "😀👍🏽\u200d❤\ufe0f", "\u0301\u0323\u0308\u093c\u20e3", "'sStTdDmM",
    "▁ <>|", "\u00a0\u3000\u2003 ", "!?#$%&*()[]{}", "पुरानदी", "\x01\x1f\x7f\x85",
]
FRAGMENTS = ["<s>", "</s>", "<|end|>", "<|endless|>", "<|pad|>", "New York", "éclair", " wonderful",
             "the", "\r\n", "<unk>"]


def awkward_texts(rng):
    texts = list(CURATED)
    while len(texts) < len(CURATED) + 130:
        text = ""
        for _ in range(rng.randint(1, 6)):
            if rng.random() < .25:
                text += rng.choice(FRAGMENTS)
            else:
                letters = rng.choice(ALPHABETS)
                text += "".join(rng.choice(letters) for _ in range(rng.randint(1, 6)))
        texts.append(text)
    texts.append("".join(rng.choice("thesea wondrful") for _ in range(1500)))
    texts.append("".join(rng.choice("ab") for _ in range(1500)))
    return texts


def train(tokenizer, vocabulary, byte_level, byte_fallback=False):
    specials = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    if byte_fallback:
        specials += [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=specials, min_frequency=2,
                                  initial_alphabet=sorted(alphabet), show_progress=False,
                                  limit_alphabet=400 if byte_level else 90)
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)


def finish(tokenizer, edit, normalized_extra):
    """Keeps <unk>, <s>, </s> as specials, adds others, and lets `edit` change the file's model."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < 3]
    edit(content["model"])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(["<|end|>", AddedToken("<|pad|>", lstrip=True, rstrip=True,
                                                        special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<|endless|>", normalized=False),
                          AddedToken("New York", normalized=normalized_extra),
                          AddedToken("New York City", rstrip=True, normalized=False),
                          AddedToken("éclair", normalized=normalized_extra)])
    return tokenizer


def as_lines(model):
    model["merges"] = [" ".join(pair) for pair in model["merges"]]


def shuffled(model):
    """Ranks that training would not give: the order of merging shows in the ids."""
    random.Random(5).shuffle(model["merges"])
    as_lines(model)


def whole_words(model):
    """Pieces that no merges make."""
    for word in ["Ġwonderfully", "lighthouses", "Ġ123", "ĠĠĠĠĠĠĠ"]:
        model["vocab"].setdefault(word, len(model["vocab"]))
    model["ignore_merges"] = True


def template(tokenizer):
    return processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                         special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])


def make_gpt2():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    train(t, 500, True)
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    return finish(t, shuffled, True)


def make_gpt2_prefix():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    t.decoder = decoders.ByteLevel()
    train(t, 360, True)
    t.post_processor = template(t)
    return finish(t, lambda model: None, False)


def make_neox():
    """GPT-NeoX: GPT-2's pattern behind NFC, and runs of spaces as added tokens that are looked for first."""
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    t.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=True)
    train(t, 450, True)
    t.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    t = finish(t, as_lines, True)
    t.add_tokens([AddedToken(" " * n, normalized=True) for n in range(16, 1, -1)])
    return t


def make_split(pattern, vocabulary, normalizer, edit, extra):
    t = Tokenizer(models.BPE())
    if normalizer:
        t.normalizer = normalizer
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    train(t, vocabulary, True)
    byte_level = processors.ByteLevel(trim_offsets=True)
    t.post_processor = byte_level if normalizer else processors.Sequence([byte_level, template(t)])
    return finish(t, edit, extra)


def make_metaspace(scheme, split, byte_fallback, vocabulary):
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=byte_fallback,
                             byte_fallback=byte_fallback))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    train(t, vocabulary, False, byte_fallback)
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    if byte_fallback:
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        t.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    t.post_processor = template(t)
    return finish(t, as_lines if byte_fallback else lambda model: None, not byte_fallback)


def make_llama2():
    t = make_metaspace("always", True, True, 600)
    content = json.loads(t.to_str())
    content["pre_tokenizer"] = None
    content["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    for token in content["added_tokens"]:
        token["normalized"] = token["content"] in ("New York", "éclair")
    return Tokenizer.from_str(json.dumps(content))


def random_ids(tokenizer, byte_level, rng):
    """Ids that no text gives; bytes that are no text only where all implementations agree."""
    ids = [i for i in range(tokenizer.get_vocab_size())
           if byte_level or not tokenizer.id_to_token(i).startswith("<0x")]
    made = []
    while len(made) < 40:
        sequence = [rng.choice(ids) for _ in range(rng.randint(1, 14))]
        if "\0" not in tokenizer.decode(sequence):  # which strings of the test cannot hold
            made.append(sequence)
    return made


def make_spm(**options):
    """A SentencePiece model. Identity normalisation, as the Llama family has it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in TEXT.splitlines() if line), model_writer=model,
        normalization_rule_name="identity", minloglevel=2, num_threads=1, hard_vocab_limit=False, **options)
    return model.getvalue()


SPM = {  # name: (trainer's options, tokenizer_config.json)
    "spm-bpe": ({"model_type": "bpe", "vocab_size": 560, "byte_fallback": True, "split_digits": True,
                 "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
                 "character_coverage": .98}, {"add_bos_token": True, "add_eos_token": False}),
    "spm-unigram": ({"model_type": "unigram", "vocab_size": 220, "character_coverage": .98,
                     "user_defined_symbols": ["<|end|>", "New York"]}, None),
    "spm-bytes": ({"model_type": "unigram", "vocab_size": 480, "byte_fallback": True,
                   "add_dummy_prefix": False, "remove_extra_whitespaces": False,
                   "unk_surface": "?!"}, {"add_bos_token": False}),
}


def spm_cases(out, name, texts):
    options, config = SPM[name]
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(make_spm(**options))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    first = [sp.bos_id()] if config is None or config["add_bos_token"] else []
    ids = [sp.encode(text) for text in texts]
    shown = [sp.decode(i) for i in ids]
    rng = random.Random(3)
    known = [i for i in range(len(sp)) if not sp.is_byte(i)]
    made_up = [[rng.choice(known if rng.random() < .8 else known[:6]) for _ in range(rng.randint(1, 14))]
               for _ in range(40)]
    print(f"{name}: {len(sp)} pieces, {sum(map(len, ids))} ids, "
          f"{sum(a != b for a, b in zip(texts, shown))} texts that do not come back as they were")
    return {"name": name, "first": first, "n_vocab": len(sp), "ids": ids,
            "decoded": [None if a == b else b for a, b in zip(texts, shown)],
            "random_ids": made_up, "random_decoded": [sp.decode(i) for i in made_up]}


def main(out_dir):
    if tokenizers.__version__ != VERSION:
        sys.exit(f"tokenizers {VERSION} is needed, found {tokenizers.__version__}")
    if sentencepiece.__version__ != SPM_VERSION:
        sys.exit(f"sentencepiece {SPM_VERSION} is needed, found {sentencepiece.__version__}")
    out = pathlib.Path(out_dir)
    made = {
        "gpt2": make_gpt2(),
        "gpt2-prefix": make_gpt2_prefix(),
        "gpt-neox": make_neox(),
        "llama3": make_split(LLAMA3_SPLIT, 560, None, whole_words, False),
        "qwen2": make_split(QWEN2_SPLIT, 480, normalizers.NFC(), lambda model: None, True),
        "metaspace-first": make_metaspace("first", False, True, 560),
        "metaspace-unknown": make_metaspace("always", True, False, 260),
        "llama2": make_llama2(),
    }
    texts = awkward_texts(random.Random(1))
    cases = {"made_by": f"make_tokenizer_cases.py, tokenizers {VERSION}, sentencepiece {SPM_VERSION}",
             "texts": texts,
             "tokenizers": []}
    for name, tokenizer in made.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        content = json.loads(tokenizer.to_str())
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False,
                                                          separators=(",", ":")) + "\n")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        first = tokenizer.encode("").ids
        ids, decoded = [], []
        for text in texts:
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            if tokenizer.encode(text).ids != first + plain:
                sys.exit(f"{name}: specials are not a prefix of {text!r}")
            shown = tokenizer.decode(plain, skip_special_tokens=True)
            ids.append(plain)
            decoded.append(None if shown == text else shown)
        made_up = random_ids(tokenizer, "gpt" in name or name in ("llama3", "qwen2"),
                             random.Random(2))
        cases["tokenizers"].append({
            "name": name, "first": first, "n_vocab": tokenizer.get_vocab_size(), "ids": ids,
            "decoded": decoded, "random_ids": made_up,
            "random_decoded": [tokenizer.decode(i, skip_special_tokens=True) for i in made_up]})
        print(f"{name}: {tokenizer.get_vocab_size()} tokens, "
              f"{sum(map(len, ids))} ids, {sum(d is not None for d in decoded)} texts that do not "
              "come back as they were")
    cases["tokenizers"] += [spm_cases(out, name, texts) for name in SPM]
    (out / "cases.json").write_text(json.dumps(cases, ensure_ascii=False, separators=(",", ":"))
                                    + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

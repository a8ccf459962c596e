"""Task `translation`: a made-up language into English, with a gloss before each sentence.

The language has one word per English word (drawn once, from a fixed seed), the order adverb,
place, verb, object, subject, plural -im, definite -ta, object -n, place -sh, tense suffixes on
the verb and the negation ne-. The answer first copies each group of words with its meaning
("vifuok = saw"), then gives the English sentence, so that a small model can learn the task.
"""
import random

from words import NUMBERS, Document

NOUNS = """farmer king queen child bird fish horse dog cat cow baker sailor soldier teacher doctor
hunter painter singer thief witch giant monk stone river tree house boat book bread lamp key rope
ring sword crown apple flower cloud star moon mountain road door window table chair cup knife bell
coin letter map song story dream drum flute basket blanket hat shoe coat wagon wheel hammer ladder
bridge tower garden forest field island village market castle temple cave lake hill wall candle
mirror feather egg bee bear wolf fox frog goat sheep duck mouse spider snake turtle owl eagle
whale""".split()
IRREGULAR = {"child": "children", "fish": "fish", "sheep": "sheep", "knife": "knives",
             "thief": "thieves", "wolf": "wolves", "mouse": "mice", "bread": "breads"}
VERBS = [tuple(pair.split(":")) for pair in """see:saw find:found carry:carried paint:painted
steal:stole love:loved fear:feared follow:followed break:broke build:built hide:hid sell:sold
buy:bought hear:heard wash:washed lift:lifted chase:chased draw:drew bring:brought forget:forgot
watch:watched help:helped hate:hated clean:cleaned lose:lost want:wanted guard:guarded burn:burned
throw:threw count:counted visit:visited teach:taught feed:fed touch:touched praise:praised
wake:woke call:called catch:caught cover:covered repair:repaired""".split()]
ADJECTIVES = """old young red blue green white black small big happy sad brave quiet loud wise poor
rich cold warm strong weak golden silver heavy strange hungry tired gentle angry clever lazy proud
shy kind lonely famous""".split()
PREPOSITIONS = "near behind under above inside without".split()
ADVERBS = "today yesterday often never slowly quickly secretly again together early".split()
COUNTS = NUMBERS[2:11]


def build_lexicon(seed=7):
    """English word (verbs: the base form) -> stem; no stem is the beginning of another."""
    rng = random.Random(seed)
    starts, inner = "p t k b d g m n s l r v z h f".split(), "p t k b d g m n s l r v z".split()
    vowels, ends = "a e i o u".split(), ["", "", "k", "r", "s", "l"]
    lexicon = {}
    for word in NOUNS + [base for base, _ in VERBS] + ADJECTIVES + PREPOSITIONS + ADVERBS + COUNTS:
        syllables = rng.choice([2, 2, 3])
        while word not in lexicon:
            stem = "".join(rng.choice(starts) + rng.choice(vowels) for _ in range(syllables - 1))
            stem += rng.choice(inner) + rng.choice(vowels) + rng.choice(ends)
            if not any(stem.startswith(old) or old.startswith(stem) for old in lexicon.values()):
                lexicon[word] = stem
    return lexicon


LEXICON = build_lexicon()


def plural(noun):
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    return noun + ("es" if noun.endswith(("ch", "sh", "s", "x")) else "s")


def third_person(verb):
    if verb.endswith("ry"):
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("ch", "sh")) else "s")


def noun_phrase(rng, case):
    """case: '' subject, 'n' object, 'sh' place. Returns (made-up, English, is plural)."""
    noun = rng.choice(NOUNS)
    many = rng.random() < .35
    count = rng.choice(COUNTS) if many and rng.random() < .5 else None
    adjective = rng.choice(ADJECTIVES) if rng.random() < .5 else None
    definite = rng.random() < .6 or (many and not count)
    english = " ".join(filter(None, ["the" if definite else None, count, adjective,
                                     plural(noun) if many else noun]))
    if not definite and not many:
        english = ("an " if english[0] in "aeiou" else "a ") + english
    number = "im" if many else ""
    made_up = LEXICON[noun] + number + ("ta" if definite else "") + case
    if adjective:
        made_up += " " + LEXICON[adjective] + number
    if count:
        made_up += " " + LEXICON[count]
    return made_up, english, many


def verb_phrase(rng, many):
    """Returns (made-up, English) of a verb in a random tense."""
    base, past = rng.choice(VERBS)
    tense = rng.choice(["past", "present", "future", "negation"])
    stem = LEXICON[base]
    if tense == "past":
        return stem + "ok", past
    if tense == "present":
        return stem + "ei", base if many else third_person(base)
    if tense == "future":
        return stem + "um", "will " + base
    return "ne" + stem + "ok", "did not " + base


def sentence(rng):
    """Returns (groups of (made-up, English) in the made-up order, English sentence)."""
    subject, subject_english, many = noun_phrase(rng, "")
    thing, thing_english, _ = noun_phrase(rng, "n")
    verb, verb_english = verb_phrase(rng, many)
    groups = [(verb, verb_english), (thing, thing_english), (subject, subject_english)]
    english = f"{subject_english} {verb_english} {thing_english}"
    if rng.random() < .35:
        preposition = rng.choice(PREPOSITIONS)
        place, place_english, _ = noun_phrase(rng, "sh")
        place_english = f"{preposition} {place_english}"
        groups.insert(0, (f"{place} {LEXICON[preposition]}", place_english))
        english += " " + place_english
    if rng.random() < .25:
        adverb = rng.choice(ADVERBS)
        groups.insert(0, (LEXICON[adverb], adverb))
        english += " " + adverb
    return groups, english[0].upper() + english[1:] + "."


def make(rng, short=False):
    """A `translation` document of 2 to 4 sentences (`short`: one)."""
    sentences = [sentence(rng) for _ in range(1 if short else rng.randint(2, 4))]
    text = " ".join(" ".join(word for word, _ in groups) + "." for groups, _ in sentences)
    answer, facts = "", []
    for groups, english in sentences:
        glosses = [f"{word} = {meaning}" for word, meaning in groups]
        answer += " " + ", ".join(glosses) + ": " + english
        facts += glosses + [english]
    prompt = f"Task: translation\nText: {text}\nEnglish:"
    return Document("translation", prompt, answer, tuple(facts))

"""Short exercises for the training curriculum: copying, looking up, word lists and sums."""
from language import ADJECTIVES, ADVERBS, LEXICON, NOUNS, PREPOSITIONS, noun_phrase, verb_phrase
from story import LEAST, MOST, STEP
from words import (ACTIVITIES, COLORS, DAYS, FOODS, ITEMS, JOBS, NAMES, NUMBERS, PLACES, THINGS,
                   Document)

POOL = (NAMES + PLACES + DAYS + NUMBERS + NOUNS + THINGS + COLORS + JOBS + list(FOODS) + ITEMS
        + ACTIVITIES + ADJECTIVES + list(LEXICON.values()))


def copying(rng):
    text = " ".join(rng.choice(POOL) for _ in range(rng.randint(4, 20)))
    return Document("copy", f"Task: copy\nText: {text}\nCopy:", " " + text, (text,))


def looking_up(rng):
    """A table of people, then sentences about them in another order."""
    rows = [(name, rng.choice(JOBS), rng.choice(PLACES), rng.choice(NUMBERS[2:]),
             rng.choice(list(FOODS)), f"{rng.choice(COLORS)} {rng.choice(THINGS)}")
            for name in rng.sample(NAMES, rng.randint(2, 7))]
    table = "\n".join(f" {name} {job}, home {place}, bag {count} {food}, {thing}"
                      for name, job, place, count, food, thing in rows)
    rng.shuffle(rows)
    told = [rng.choice([f"{name} the {job} lives at the {place}.", f"{name} has {count} {food}.",
                        f"{name} owns a {thing}.", f"The {thing} belongs to {name}.",
                        f"At the {place} lives {name}."])
            for name, job, place, count, food, thing in rows]
    asked = ", ".join(row[0] for row in rows)
    return Document("lookup", f"Task: facts\n{table}\nAsk: {asked}\nFacts:",
                    " " + " ".join(told), tuple(told))


def word_list(rng):
    """Glosses of single groups of the made-up language."""
    pairs = []
    for _ in range(rng.randint(2, 12)):
        kind = rng.random()
        if kind < .5:
            made_up, english, _ = noun_phrase(rng, rng.choice(["", "", "n"]))
        elif kind < .8:
            made_up, english = verb_phrase(rng, rng.random() < .5)
        else:
            english = rng.choice(ADJECTIVES + PREPOSITIONS + ADVERBS)
            made_up = LEXICON[english]
        pairs.append((made_up, english))
    text = ", ".join(made_up for made_up, _ in pairs)
    glosses = tuple(f"{made_up} = {english}" for made_up, english in pairs)
    return Document("words", f"Task: words\nText: {text}\nEnglish:", " " + ", ".join(glosses),
                    glosses)


def sums(rng):
    """A running count in the words of the story task."""
    count = rng.randint(LEAST, MOST)
    start, plan, told = NUMBERS[count], [], []
    for _ in range(rng.randint(2, 9)):
        event = rng.choice(["find", "give", "lose"])
        if count == MOST:
            event = rng.choice(["give", "lose"])
        elif count == LEAST:
            event = "find"
        change = rng.randint(1, min(STEP, MOST - count if event == "find" else count - LEAST))
        count += change if event == "find" else -change
        plan.append(f"{event} {NUMBERS[change]}")
        told.append(f"{plan[-1]}, now {NUMBERS[count]}.")
    prompt = f"Task: sums\nBag: {start}\nPlan: {'; '.join(plan)}\nSums:"
    return Document("sums", prompt, " " + " ".join(told), tuple(told))


DRILLS = [copying, looking_up, word_list, sums]

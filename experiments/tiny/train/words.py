"""Word lists shared by the document generators, and the `Document` they all produce."""
from typing import NamedTuple, Tuple


class Document(NamedTuple):
    """One text. `prompt` ends with a colon, `answer` begins with a space and follows at once."""

    task: str
    prompt: str
    answer: str
    facts: Tuple[str, ...]  # substrings of the answer that a right answer must contain


WOMEN = "Anna Mira Lena Rosa Ida Nora Vera Tilda Elsa Greta Hanna Clara Selma Petra Frida Olga " \
        "Ruth Alma".split()
MEN = "Ben Oren Tobin Karl Felix Hugo Ivan Jonas Leo Marek Nils Oscar Paul Rolf Sven Theo " \
      "Viktor Emil".split()
NAMES = WOMEN + MEN
PRONOUN = {name: "she" for name in WOMEN}
PRONOUN.update({name: "he" for name in MEN})
POSSESSIVE = {name: "her" for name in WOMEN}
POSSESSIVE.update({name: "his" for name in MEN})

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = "mill harbor market bridge library tower garden forest river school temple station " \
         "bakery castle meadow valley lighthouse workshop orchard cave farm museum theater park " \
         "inn well beach square stable tavern".split()

# Dialogues.
ACTIVITIES = [
    "paint the fence", "pick berries", "bake bread", "fly a kite", "repair the boat",
    "plant trees", "play cards", "practice a song", "watch the stars", "wash the wagon",
    "build a chair", "feed the ducks", "draw a map", "sell old books", "catch fish",
    "clean the windows", "learn to dance", "gather mushrooms", "collect shells",
    "write a letter"]
ITEMS = [
    "a ladder", "soup", "a blanket", "two cups", "a hammer", "some cheese", "a lantern", "bread",
    "a rope", "a basket", "fresh milk", "a drum", "paper", "a bucket", "honey", "gloves",
    "a knife", "candles", "apple cake", "a pillow", "tea", "a shovel", "nails", "a camera",
    "grapes", "an umbrella"]
CHORES = [  # {my} is my, his or her
    "visit the doctor", "help {my} uncle", "wash the dog", "study for a test",
    "work at the shop", "travel to town", "cook for {my} sister", "fix the roof",
    "mind the baby", "clean the barn"]
RELATIVES = "brother sister uncle aunt cousin neighbor teacher father mother grandfather".split()
ANIMALS = "fox badger swan deer hare crow goose snake hedgehog squirrel".split()

# Stories.
JOBS = "baker fisher weaver miller hunter potter singer smith painter tailor shepherd gardener " \
       "carpenter sailor teacher".split()
COLORS = "silver copper wooden golden glass brass blue green red white".split()
THINGS = "key lamp ring bell flute cup knife map mirror drum comb box whistle crown".split()
FOODS = {"apples": "apple", "pears": "pear", "plums": "plum", "nuts": "nut", "coins": "coin",
         "shells": "shell", "eggs": "egg", "beads": "bead", "candles": "candle",
         "berries": "berry"}  # plural: singular


def join_names(names):
    """['A', 'B', 'C'] -> 'A, B and C'."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]

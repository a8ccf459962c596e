"""Task `summary`: two people agree on a plan; the answer states what was finally agreed.

Lines are indented by one space, so that a name is the same token everywhere.
"""
from words import (ACTIVITIES, ANIMALS, CHORES, DAYS, ITEMS, NAMES, NUMBERS, PLACES, POSSESSIVE,
                   PRONOUN, RELATIVES, Document, join_names)

INVITE = ["Hi {other}, do you want to {activity} with me on {day}?",
          "Hello {other}. I would like to {activity} on {day}. Will you join me?",
          "Good morning {other}! Shall we {activity} on {day}?"]
REFUSE_DAY = ["I cannot on {day}, I must {chore}. How about {next}?",
              "Sorry, {day} is bad because I have to {chore}. Is {next} possible?",
              "Not on {day}. Could we do it on {next}?"]
ACCEPT_DAY = ["{day} is fine with me.", "Yes, {day} suits me well.",
              "Gladly, I am free on {day}."]
OFFER_PLACE = ["Let us meet at the {place}.", "Shall we meet at the {place}?",
               "I suggest the {place}."]
REFUSE_PLACE = ["The {place} is {fault}. What about the {other}?",
                "I would rather go to the {other}, the {place} is {fault}."]
NEW_PLACE = ["All right.", "That is better.", "Fine, the {place} then."]
ACCEPT_PLACE = ["Good idea.", "The {place} is perfect.", "Agreed."]
PLACE_FAULTS = ["too crowded", "closed this week", "too far away", "too noisy", "too cold"]
OFFER_HOUR = ["Is {hour} early enough?", "I can be there at {hour}.", "Let us start at {hour}."]
REFUSE_HOUR = ["{Hour} is too early for me. Let us say {other}.", "Better at {other}, please.",
               "I need more sleep than that. {Other}?"]
NEW_HOUR = ["Okay.", "Good, at {hour}.", "As you like."]
ACCEPT_HOUR = ["That works.", "{Hour} is good.", "Sure."]
CHATTER = ["My {relative} saw a {animal} near the {place} yesterday.",
           "Did you hear that {name} bought a {animal}?", "The weather was awful on {day}.",
           "I lost my hat at the {place}.", "{name} told me a joke about a {animal}.",
           "My {relative} works at the {place} now.",
           "I slept badly because a {animal} made noise all night."]
CHATTER_REPLY = ["Really? That is funny.", "Oh, I did not know that.", "What a pity.",
                 "How nice.", "I can hardly believe it."]


class Conversation:
    """The turns so far and what has been agreed; two speakers take turns."""

    def __init__(self, rng, first, second):
        self.rng = rng
        self.pair = (first, second)
        self.lines = []
        self.place = self.hour = None
        self.brings = {}

    def speaker(self):
        return self.pair[len(self.lines) % 2]

    def listener(self):
        return self.pair[(len(self.lines) + 1) % 2]

    def say(self, choices, **fields):
        text = self.rng.choice(choices).format(**fields)
        self.lines.append(f" {self.speaker()}: {text}")

    def agree_place(self):
        first, second = self.rng.sample(PLACES, 2)
        self.place = first
        self.say(OFFER_PLACE, place=first)
        if self.rng.random() < .5:
            self.say(REFUSE_PLACE, place=first, other=second,
                     fault=self.rng.choice(PLACE_FAULTS))
            self.place = second
            self.say(NEW_PLACE, place=second)
        else:
            self.say(ACCEPT_PLACE, place=first)

    def agree_hour(self):
        first, second = self.rng.sample(NUMBERS[1:], 2)
        self.hour = first
        self.say(OFFER_HOUR, hour=first)
        if self.rng.random() < .5:
            self.say(REFUSE_HOUR, Hour=first.capitalize(), other=second,
                     Other=second.capitalize())
            self.hour = second
            self.say(NEW_HOUR, hour=second)
        else:
            self.say(ACCEPT_HOUR, Hour=first.capitalize())

    def agree_items(self):
        mine, asked, instead = self.rng.sample(ITEMS, 3)
        self.brings[self.speaker()] = mine
        kind = self.rng.random()
        if kind < .4:
            self.brings[self.listener()] = asked
            self.say([f"I will bring {mine}. Can you bring {asked}?"])
            self.say(["Yes, I can.", "Of course.", "No problem."])
        elif kind < .75:
            self.brings[self.listener()] = instead
            self.say([f"I will bring {mine}. Do you have {asked}?"])
            self.say([f"No, but I can bring {instead}.",
                      f"Not any more. I will take {instead} instead."])
        else:
            self.say([f"I will bring {mine}."])
            self.say(["Great.", "I have nothing to bring.", "Thank you."])

    def chatter(self, absent_names):
        pick = self.rng.choice
        self.say(CHATTER, relative=pick(RELATIVES), animal=pick(ANIMALS), place=pick(PLACES),
                 name=pick(absent_names), day=pick(DAYS))
        self.say(CHATTER_REPLY)


def make(rng, short=False):
    """A `summary` document; `short` leaves topics out (for the training curriculum only)."""
    has_guest = rng.random() < .35
    people = rng.sample(NAMES, 4)
    first, second, guest, absent = people
    activity = rng.choice(ACTIVITIES)
    days = rng.sample(DAYS, rng.choice([0, 1, 1, 2]) + 1)
    day = days[-1]

    talk = Conversation(rng, first, second)
    talk.say(INVITE, other=second, activity=activity, day=days[0])
    for refused, proposed in zip(days, days[1:]):
        chore = rng.choice(CHORES).format(my="my")
        talk.say(REFUSE_DAY, day=refused, next=proposed, chore=chore)
    talk.say(ACCEPT_DAY, day=day)

    topics = ["place", "hour", "items"]
    rng.shuffle(topics)
    if short:
        topics = topics[:rng.randint(0, 2)]
    elif rng.random() < .5:
        topics.append("chatter")
    if has_guest:
        topics.append("guest")
    elif rng.random() < .3:
        topics.append("absent")
    rng.shuffle(topics)
    excuse = None
    for topic in topics:
        if topic == "place":
            talk.agree_place()
        elif topic == "hour":
            talk.agree_hour()
        elif topic == "items":
            talk.agree_items()
        elif topic == "chatter":
            talk.chatter([name for name in NAMES if name not in people])
        elif topic == "guest":
            talk.say([f"Can {guest} come too?", f"Should we ask {guest} as well?"])
            talk.say([f"Yes, {guest} is welcome.",
                      f"I already asked {guest}, the answer is yes."])
        else:
            excuse = rng.choice(CHORES).format(my=POSSESSIVE[absent])
            talk.say([f"What about {absent}?"])
            talk.say([f"{absent} has to {excuse}."])

    who = join_names([first, second] + ([guest] if has_guest else []))
    place = f" at the {talk.place}" if talk.place else ""
    hour = f" at {talk.hour}" if talk.hour else ""
    sentences = [f"{who} will {activity}{place} on {day}{hour}."]
    facts = [f"{who} will", f"will {activity}", f"on {day}"]
    facts += [f"at the {talk.place} on"] if talk.place else []
    facts += [f"at {talk.hour}."] if talk.hour else []
    brings = [f"{name} will bring {talk.brings[name]}"
              for name in (first, second) if name in talk.brings]
    if brings:
        sentences.append(" and ".join(brings) + ".")
        facts += brings
    if excuse:
        sentences.append(f"{absent} cannot come because {PRONOUN[absent]} has to {excuse}.")
        facts.append(sentences[-1])
    prompt = "Task: summary\n" + "\n".join(talk.lines) + "\nSummary:"
    return Document("summary", prompt, " " + " ".join(sentences), tuple(facts))

"""Task `story`: tell a story from a plan, keeping track of place, company, load and a count.

Numbers stay between 2 and 12 and change by 1 to 3, so that the sums are few and learnable.
"""
from words import (COLORS, FOODS, JOBS, NAMES, NUMBERS, PLACES, POSSESSIVE, PRONOUN, THINGS,
                   Document)

LEAST, MOST, STEP = 2, 12, 3  # bounds of the count, largest change
TONES = ["calm", "merry", "grave"]
# One template per tone. {some} is a changed amount with its noun, {now} the count after it.
TEMPLATES = {
    "start": [
        "{hero} the {job} lived at the {place}. In {her} bag were {now} {food} and a {thing}.",
        "Once upon a time a cheerful {job} named {hero} lived at the {place} with {now} {food} "
        "and a {thing}.",
        "This is the sad tale of {hero}, a {job} of the {place}. {She} owned only {now} {food} "
        "and a {thing}."],
    "go": [
        "{hero} left the {origin} and walked slowly to the {place}.",
        "{She} danced all the way from the {origin} to the {place}, and {hero} sang.",
        "With a heavy heart {hero} turned away from the {origin}. The road to the {place} was "
        "long."],
    "meet": [
        "There {she} met {guest} the {trade}, who sat in the shade.",
        "Who was waiting at the {place}? It was {guest} the {trade}, laughing!",
        "At the {place} stood {guest} the {trade}, pale and silent."],
    "give": [
        "{hero} gave {guest} {some} and kept {now}.",
        "Take {some}, said {hero}, and {guest} clapped. Now {she} had {now}.",
        "{guest} was hungry, so {hero} handed over {some}. Only {now} remained."],
    "find": [
        "Under a tree at the {place} {she} found {some}, so now there were {now}.",
        "What luck! {Some} lay on the ground, and {hero} danced with {now}.",
        "Among the ruins of the {place} {hero} gathered {some}, which made {now}."],
    "trade": [
        "{guest} admired the {thing}. {hero} traded it for a {new}.",
        "Let us swap, said {guest} the {trade}, and the {thing} became a {new}!",
        "{hero} had to give up the {thing}. In return {guest} offered a {new}."],
    "storm": [
        "Then rain fell on the {place}, and {hero} waited quietly with {her} {thing}.",
        "A storm! {hero} ran in circles at the {place} and held the {thing} like a hat.",
        "A terrible storm broke over the {place}. {hero} wept and clutched the {thing}."],
    "sleep": [
        "At night {hero} slept at the {place} and dreamed of {friend}.",
        "{hero} fell asleep at the {place} and snored so loudly that {friend} heard it.",
        "In the dark of the {place} {she} lay awake and thought of {friend}."],
    "lose": [
        "On the way {some} fell out of the bag. {hero} counted {now}.",
        "Oops! {Some} rolled away, but {hero} only giggled. {Now} were enough.",
        "A crow stole {some} from {hero}. {Now} were left."],
    "end": [
        "In the evening {hero} came home to the {home} with {now} {food} and the {thing}. "
        "{friend} was glad.",
        "So {hero} skipped home to the {home}, showed {friend} the {thing}, and together they "
        "ate {now} {food}. Hurrah!",
        "At last {hero} reached the {home}. {She} gave {friend} the {thing} and {now} {food}, "
        "and never left again."],
}


def possible_events(last, guest, guests_left, at_home, count):
    """The events that may follow, some listed more than once to make them likelier."""
    events = [] if last == "go" else ["go"]
    if last == "go" and guests_left and not at_home:
        events += ["meet"] * 3
    if guest and count > LEAST:
        events += ["give"] * 2
    if guest and last != "trade":
        events.append("trade")
    if count < MOST:
        events.append("find")
    if count > LEAST and last != "lose":
        events.append("lose")
    if last not in ("storm", "sleep"):
        events += ["storm", "sleep"]
    return events


def make(rng, short=False):
    """A `story` document of 6 to 10 events (`short`: 1 to 4)."""
    hero, friend, *guests = rng.sample(NAMES, 5)
    tone = rng.randrange(len(TONES))
    job, home, food = rng.choice(JOBS), rng.choice(PLACES), rng.choice(list(FOODS))
    count = rng.randint(4, 10)
    thing = f"{rng.choice(COLORS)} {rng.choice(THINGS)}"
    trades = {guest: rng.choice(JOBS) for guest in guests}
    place, guest, last = home, None, ""
    people = list(guests)
    rng.shuffle(people)
    header = (f"Task: story\nTone: {TONES[tone]}\nHero: {hero} the {job}, home {home}, "
              f"friend {friend}\nBag: {NUMBERS[count]} {food}, {thing}\nPeople: "
              + ", ".join(f"{name} {trades[name]}" for name in people))
    plan, told = [], []

    def tell(event, change=0, **extra):
        amount = NUMBERS[abs(change)] + " " + (FOODS[food] if abs(change) == 1 else food)
        now = NUMBERS[count]
        fields = dict(hero=hero, friend=friend, job=job, home=home, food=food, thing=thing,
                      place=place, guest=guest, trade=trades.get(guest), she=PRONOUN[hero],
                      She=PRONOUN[hero].capitalize(), her=POSSESSIVE[hero], some=amount,
                      Some=amount.capitalize(), now=now, Now=now.capitalize())
        fields.update(extra)
        told.append(TEMPLATES[event][tone].format(**fields))

    tell("start")
    for _ in range(rng.randint(1, 4) if short else rng.randint(6, 10)):
        last = rng.choice(possible_events(last, guest, guests, place == home, count))
        if last == "go":
            origin = place
            place = rng.choice([name for name in PLACES if name not in (origin, home)])
            guest = None
            plan.append(f"go {place}")
            tell("go", origin=origin)
        elif last == "meet":
            guest = guests.pop(0)
            plan.append(f"meet {guest}")
            tell("meet")
        elif last in ("give", "lose", "find"):
            room = MOST - count if last == "find" else count - LEAST
            change = rng.randint(1, min(STEP, room))
            count += change if last == "find" else -change
            plan.append(f"{last} {NUMBERS[change]}")
            tell(last, change)
        elif last == "trade":
            new = f"{rng.choice(COLORS)} {rng.choice(THINGS)}"
            plan.append(f"trade {new}")
            tell("trade", new=new)
            thing = new
        else:
            plan.append(last)
            tell(last)
    tell("end")
    prompt = header + "\nPlan: " + "; ".join(plan) + "\nStory:"
    return Document("story", prompt, " " + " ".join(told), tuple(told))

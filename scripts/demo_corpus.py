"""The text of the embedded demo: the base model's pretraining corpus, and the task.

A document is a sentence about an order or a stay, then the same facts told again in other ways:
questions, lists, tags, calls, tables. So the base learns to copy names and values out of a sentence
into any layout. One layout never occurs in it: the JSON object. Writing that is the task.

People whose `is_held_out` is true never occur in the pretraining text or in the training rows; the
evaluation rows are about nobody else.
"""

import dataclasses
import itertools
import json
import random
import zlib
from collections.abc import Callable, Iterator

FIRST_NAMES = (
    "Ada Alma Amir Anna Aron Bela Boris Carl Clara Dana David Diego Edith Elena Emil Eva Felix "
    "Flora Frida Georg Greta Hana Hugo Ida Igor Inge Ivan Jana Jon Julia Kai Karin Lara Laura "
    "Leo Lina Luca Maria Marta Max Mila Mira Nadia Nico Nina Noah Nora Olga Omar Oscar Paul Petra "
    "Rosa Ruth Samir Sara Sofia Tara Theo Tom Vera Victor Yara Zoe"
).split()
SURNAME_STARTS = (
    "Bern Bren Dal Dorn Fal Fisch Gar Hal Holm Kel Kram Lind Mar Mol Nor Ost Per Quin Ros Sand "
    "Stein Tar Val Wein Wes Zim"
).split()
SURNAME_ENDS = "ber berg den dorf er feld gren hof ler mann mer ner sen son strom ton wood".split()
CITY_STARTS = (
    "Alt Ash Bar Black Brook East Fern Gold Green Hill Lake New North Oak Red Stone".split()
)
CITY_ENDS = "bridge burg bury field ford haven mouth port stad ville".split()
KNOWN_CITIES = (
    "Oslo Milan Rome Berlin London Madrid Vienna Prague Lisbon Dublin Turin Cairo".split()
)
ITEMS = (
    "apron basket bell blanket bag book bottle bowl broom bucket candle carpet chair clock coat "
    "cup curtain desk drum fork guitar hammer hat jacket jar kettle ladder lamp mirror mug pan pen "
    "pillow plate pot ring rope scarf shirt sofa spoon stool table tent towel tray vase wallet"
).split()
COLOURS = "red blue green black white yellow brown grey pink purple orange golden".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

ORDERS = (
    "{name} ordered {count} {colour} {items} from {city} for {price} dollars{when}.",
    "{name} bought {count} {colour} {items} in {city} for {price} dollars{when}.",
    "{name} paid {price} dollars for {count} {colour} {items} from {city}{when}.",
    "{name} from {city} wanted {count} {colour} {items} and paid {price} dollars{when}.",
    "{count} {colour} {items} went from {city} to {name} for {price} dollars{when}.",
    "{count} {colour} {items} were sold to {name} in {city} for {price} dollars{when}.",
    "For {price} dollars {name} got {count} {colour} {items} in {city}{when}.",
    "In {city} {name} found {count} {colour} {items} for {price} dollars{when}.",
    "From {city} came {count} {colour} {items} for {name}, at {price} dollars{when}.",
    "A shop in {city} sold {name} {count} {colour} {items} for {price} dollars{when}.",
    "The bill of {name} in {city} was {price} dollars for {count} {colour} {items}{when}.",
    "It cost {name} {price} dollars to get {count} {colour} {items} from {city}{when}.",
)
STAYS = (
    "{name} booked a room in {city} for {count} nights at {price} dollars, from {day}.",
    "On {day} {name} came to {city} and paid {price} dollars for {count} nights.",
    "A hotel in {city} gave {name} {count} nights for {price} dollars, from {day}.",
    "From {day} on {name} stayed {count} nights in {city} and paid {price} dollars.",
    "For {price} dollars {name} had a room in {city} for {count} nights, from {day}.",
)
KEYS = {
    "name": "name who buyer customer person".split(),
    "item": "item thing product article".split(),
    "colour": "colour shade paint".split(),
    "count": "count number amount quantity".split(),
    "city": "city place town where".split(),
    "price": "price cost total bill".split(),
    "day": "day date when".split(),
}
ECHOES = ("{}", '"{}"', "Again: {}", "({})", "[{}]", "- {}", '"{}", they said.')
DRILL_WORDS = (
    *(*FIRST_NAMES, *KNOWN_CITIES, *ITEMS, *COLOURS, *DAYS),
    *(key for keys in KEYS.values() for key in keys),
    *(str(number) for number in range(100)),
)
NUM_DRILLS = 16_000  # documents at the start that are drills
NUMBERS = ("count", "price")
ANSWER_KEYS = ("name", "item", "colour", "count", "city", "price")

Facts = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Row:
    """One example of the task; `prompt` and `completion` are joined as they stand."""

    prompt: str
    completion: str


def is_held_out(name: str) -> bool:
    """True for the one person in eight about whom only evaluation rows are written."""
    return zlib.crc32(name.encode()) % 8 == 0


def corpus(seed: int) -> Iterator[str]:
    """Endless pretraining documents, the same for the same seed. None holds a JSON object."""
    rng = random.Random(f"corpus {seed}")
    for index in itertools.count():
        # Copying is learnt in minutes from drills, and then used; from prose alone it takes hours.
        if index < NUM_DRILLS or rng.random() < 0.15:
            yield _drill(rng)
            continue
        facts = _order(rng, held_out=False) if rng.random() < 0.8 else _stay(rng)
        sentence = _sentence(rng, facts)
        lines = [sentence]
        if rng.random() < 0.4:  # word for word: what copying is learnt from first
            lines.append(rng.choice(ECHOES).format(sentence))
        lines += [rng.choice(RETELLINGS)(rng, facts) for _ in range(rng.randint(1, 3))]
        yield "\n".join(lines)


def rows(seed: int, num: int, held_out: bool) -> list[Row]:
    """`num` different rows of the task: about held-out people alone, or about none of them."""
    rng = random.Random(f"rows {seed} {held_out}")
    found: dict[str, Row] = {}
    while len(found) < num:
        facts = _order(rng, held_out)
        answer = {key: int(facts[key]) if key in NUMBERS else facts[key] for key in ANSWER_KEYS}
        row = Row(_sentence(rng, facts) + "\n", json.dumps(answer))
        found.setdefault(row.prompt, row)
    return list(found.values())


def _drill(rng: random.Random) -> str:
    """Names, words and values in any order, said again word for word, sometimes quoted."""
    words = [
        rng.choice((_person(rng, held_out=False), *rng.choices(DRILL_WORDS, k=3)))
        for _ in range(rng.randint(3, 10))
    ]
    line = rng.choice((" ", " ", " ", ", ")).join(words)
    if rng.random() < 0.7:
        return "\n".join([line] * 4)
    return line + "\n" + rng.choice((", ", " ")).join(f'"{word}"' for word in words)


def _person(rng: random.Random, held_out: bool) -> str:
    while True:
        surname = rng.choice(SURNAME_STARTS) + rng.choice(SURNAME_ENDS)
        name = f"{rng.choice(FIRST_NAMES)} {surname}"
        if is_held_out(name) == held_out:
            return name


def _city(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(KNOWN_CITIES)
    return rng.choice(CITY_STARTS) + rng.choice(CITY_ENDS)


def _order(rng: random.Random, held_out: bool) -> Facts:
    return {
        "name": _person(rng, held_out),
        "item": rng.choice(ITEMS),
        "colour": rng.choice(COLOURS),
        "count": str(rng.randint(2, 99)),
        "city": _city(rng),
        "price": str(rng.randint(2, 999)),
    }


def _stay(rng: random.Random) -> Facts:
    return {
        "name": _person(rng, held_out=False),
        "city": _city(rng),
        "count": str(rng.randint(2, 30)),
        "price": str(rng.randint(2, 999)),
        "day": rng.choice(DAYS),
    }


def _sentence(rng: random.Random, facts: Facts) -> str:
    if "day" in facts:
        return rng.choice(STAYS).format(**facts)
    when = rng.choice(("", "", "", " today", " last week", f" on {rng.choice(DAYS)}"))
    return rng.choice(ORDERS).format(**facts, items=facts["item"] + "s", when=when)


def _some(rng: random.Random, facts: Facts, least: int) -> list[tuple[str, str]]:
    """Some of the facts in any order, as (one of the field's names, value)."""
    fields = rng.sample(list(facts), rng.randint(least, len(facts)))
    return [(rng.choice(KEYS[field]), facts[field]) for field in fields]


def _quoted(value: str) -> str:
    return value if value.isdigit() else f'"{value}"'


def _again(rng: random.Random, facts: Facts) -> str:
    return _sentence(rng, facts)


def _questions(rng: random.Random, facts: Facts) -> str:
    layout = rng.choice(
        ("Q: which {}? A: {}", "{}? {}.", "What was the {}? It was {}.", 'Say the {}! "{}"')
    )
    joiner = rng.choice((" ", "\n"))
    return joiner.join(layout.format(*pair) for pair in _some(rng, facts, 1)[:4])


def _record(rng: random.Random, facts: Facts) -> str:
    """Fields with their values, in one of a few hundred layouts; no braces here."""
    layout = rng.choice(
        (
            "{0} = {1}",
            "{0}={1}",
            "{0}: {1}",
            "- {0}: {1}",
            "{0} is {1}",
            '"{0}" is {1}',
            '"{0}" = {1}',
            "{0} -> {1}",
            "({0} {1})",
            '("{0}" {1})',
            '["{0}", {1}]',
            "<{0}>{1}</{0}>",
            '<{0} "{1}">',
        )
    )
    value = rng.choice((str, _quoted)) if '"{1}"' not in layout else str
    joiner = rng.choice(("\n", "; ", ", ", " | ", " "))
    start, end = rng.choice(
        (("", ""), ("", "."), ("[", "]"), ("(", ")"), ("order(", ")"), ("note: ", ""), ("<", ">"))
    )
    pairs = _some(rng, facts, 2)
    return start + joiner.join(layout.format(key, value(text)) for key, text in pairs) + end


def _values(rng: random.Random, facts: Facts) -> str:
    """Values alone: a list, a tuple, or a set in braces."""
    start, end = rng.choice(("[]", "()", "{}", "{}", ("", ""), ("list ", "."), ("set {", "}")))
    value = rng.choice((str, _quoted))
    joiner = rng.choice((", ", ", ", "; ", " ", " | "))
    return start + joiner.join(value(text) for _, text in _some(rng, facts, 2)) + end


def _table(rng: random.Random, facts: Facts) -> str:
    """A line of field names, then a line of values."""
    joiner = rng.choice((",", ", ", " | ", "; "))
    value = rng.choice((str, _quoted))
    pairs = _some(rng, facts, 2)
    heads = [value(key) for key, _ in pairs]
    return joiner.join(heads) + "\n" + joiner.join(value(text) for _, text in pairs)


def _fields(rng: random.Random, facts: Facts) -> str:
    """The names of the fields alone, as in `fields {"city", "name"}`."""
    start, end = rng.choice((("fields {", "}"), ("fields [", "]"), ("{", "}"), ("keys: ", ".")))
    return start + ", ".join(f'"{key}"' for key, _ in _some(rng, facts, 2)) + end


def _speech(rng: random.Random, facts: Facts) -> str:
    key, value = rng.choice(_some(rng, facts, 1))
    return rng.choice(
        ('"The {0} is {1}", said {2}.', '{2} said: "the {0} was {1}."', '{2}: "{1}, the {0}."')
    ).format(key, value, facts["name"])


RETELLINGS: tuple[Callable[[random.Random, Facts], str], ...] = (
    _again,
    _questions,
    _record,
    _record,
    _record,
    _record,
    _values,
    _table,
    _fields,
    _speech,
)

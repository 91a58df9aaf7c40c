"""The words of the small world: names, relations, and the knowledge that lives in crumb's weights.

A *name* is an onset and an ending (2,304 in all). One in ten is held out by a hash and appears only in evaluation,
so that a fact about it can only have been read from the prompt.
"""

from __future__ import annotations

import hashlib


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


ONSETS = listed(
    "Bal Ber Bol Bran Dal Dor Dul Dren Fal Fen Fol Fran Gal Gor Gul Gren Hal Hel Hol Jar Jen Jor Kal Kel Kor Kran "
    "Lan Lor Lun Mar Mel Mor Nal Nor Pal Pel Quin Ral Rol San Sel Tal Tor Val Vel Vor Wil Zan"
)
ENDINGS = listed(
    "ada aki amo ane ara ath avi ax beth bi bo da dek den dia do el en era eth go gin ia iko il in ion ira ith ka ki "
    "la lek lo mi mund na nik o oth ra rik sa tan to um us vi"
)
NAMES = tuple(onset + ending for onset in ONSETS for ending in ENDINGS)


def bucket(text: str, buckets: int) -> int:
    """A stable number in [0, buckets) for a text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % buckets


def is_held_out_name(name: str) -> bool:
    """Whether a name is kept for evaluation only (one in ten)."""
    return bucket(name, 10) == 0


HELD_OUT_NAMES = tuple(name for name in NAMES if is_held_out_name(name))
TRAIN_NAMES = tuple(name for name in NAMES if not is_held_out_name(name))

COLORS = listed("red blue green white black yellow brown pink gray purple")
ANIMALS = listed("fox dog cat horse owl bear frog wolf goat crow")
FOODS = listed("bread soup cheese rice cake fish honey beans")
JOBS = listed("baker smith farmer sailor tailor miner hunter singer")
MATERIALS = listed("wood glass iron stone clay silver rust wool paper gold")
TOOLS = listed("hammer saw rope knife lamp shovel needle axe")

PERSON, NUMBER, CODE = "name", "number", "code"
RELATIONS: dict[str, object] = {
    "keeper": PERSON, "captain": PERSON, "teacher": PERSON, "owner": PERSON, "friend": PERSON, "mayor": PERSON,
    "maker": PERSON, "rival": PERSON, "home": PERSON, "port": PERSON, "capital": PERSON, "leader": PERSON,
    "color": COLORS, "pet": ANIMALS, "food": FOODS, "job": JOBS, "material": MATERIALS, "tool": TOOLS,
    "price": NUMBER, "age": NUMBER, "number": NUMBER, "code": CODE,
}  # fmt: skip
"""What a fact may say of a name, and where its value comes from."""

CATEGORIES = {
    "animal": ANIMALS,
    "color": COLORS,
    "food": FOODS,
    "tool": TOOLS,
    "material": MATERIALS,
    "fruit": listed("apple pear plum grape lemon cherry"),
    "vehicle": listed("boat cart train bike car ship"),
    "garment": listed("hat coat shoe shirt glove scarf"),
}
_OPPOSITES = (
    "hot cold, big small, high low, fast slow, old new, day night, up down, left right, wet dry, full empty, "
    "hard soft, rich poor, open closed, early late, light dark, happy sad, near far, thick thin, "
    "strong weak, clean dirty"
)
_CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Greece Athens, Peru Lima, Norway Oslo, "
    "Russia Moscow, Cuba Havana, Austria Vienna, England London, Germany Berlin, China Beijing, Kenya Nairobi, "
    "Poland Warsaw"
)
_SOUNDS = "dog woof, cat meow, cow moo, duck quack, owl hoot, sheep baa, lion roar, pig oink, bee buzz, frog croak"
_CYCLES = {
    "day after": listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month after": listed("January February March April May June July August September October November December"),
}


def _pairs(text: str) -> list[tuple[str, str]]:
    return [tuple(pair.split()) for pair in text.split(", ")]  # type: ignore[misc]


def _knowledge() -> tuple[tuple[str, str, str], ...]:
    found = [("category of", word, kind) for kind, words in CATEGORIES.items() for word in words]
    for a, b in _pairs(_OPPOSITES):
        found += [("opposite of", a, b), ("opposite of", b, a)]
    found += [("capital of", land, city) for land, city in _pairs(_CAPITALS)]
    found += [("sound of", animal, sound) for animal, sound in _pairs(_SOUNDS)]
    for phrase, cycle in _CYCLES.items():
        found += [(phrase, word, cycle[(i + 1) % len(cycle)]) for i, word in enumerate(cycle)]
    return tuple(found)


KNOWLEDGE = _knowledge()
"""Fixed (phrase, key, value) triples; "The {phrase} {key} is {value}." They live in the weights, never in a prompt."""

"""JSON: taken from a sentence, nested, and turned into other forms and back."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from .document import Document, Item, Split, assistant, draw, finish, generator, system, user
from .needles import nonsense
from .phrases import CAPITALS, CITIES, COLORS, JOBS, NAMES, OBJECTS, PLACES

_PERSON = (
    "{name} is {age} years old and lives in {city}.",
    "{name} lives in {city} and is {age} years old.",
    "My friend {name} is {age} and lives in {city}.",
    "In {city} there lives {name}, who is {age} years old.",
    "{name}, {age}, is from {city}.",
    "{name} from {city} is {age} years old.",
)
_WORKER = (
    "{name} is a {job} in {city} and is {age} years old.",
    "{name}, {age}, works as a {job} in {city}.",
    "The {job} {name} lives in {city} and is {age} years old.",
)
_EXTRACT = (
    "Extract {fields} as JSON.",
    "Extract {fields} as JSON:",
    "Give me {fields} as JSON.",
    "Return {fields} as a JSON object.",
    "Extract the {fields} from this text as JSON.",
)


def json_extract(
    rng: Random,
    split: Split = "train",
    *,
    fields: tuple[str, ...] | None = None,
    thinking: bool | None = None,
) -> Document:
    """A sentence about a person, to be turned into exactly one JSON object."""
    thinking = rng.random() < 0.25 if thinking is None else thinking
    if fields is None:
        fields = ("name", "age", "city")
        if rng.random() < 0.4:
            fields = tuple(rng.sample(("name", "age", "city", "job"), rng.randint(2, 4)))

    def sample() -> tuple[str, str]:
        name = rng.choice(NAMES)
        if rng.random() < 0.25:
            name = nonsense(rng).capitalize()
        cities = CITIES if rng.random() < 0.6 else tuple(CAPITALS.values())
        return name, rng.choice(cities)

    name, city = draw(split, sample, lambda p: ("person", *p))
    person: dict[str, Any] = {
        "name": name,
        "age": rng.randint(5, 95),
        "city": city,
        "job": rng.choice(JOBS),
    }
    bank = _WORKER if "job" in fields or rng.random() < 0.2 else _PERSON
    sentence = rng.choice(bank).format(**person)
    listed = f"{', '.join(fields[:-1])} and {fields[-1]}" if len(fields) > 1 else fields[0]
    order = rng.choice(_EXTRACT).format(fields=listed)
    prompt = rng.choice((f"{order}\n{sentence}", f"{order} {sentence}", f"{sentence}\n{order}"))
    answer = json.dumps({f: person[f] for f in fields})
    reasoning = ", ".join(f"{f}: {person[f]}" for f in fields) + "." if thinking else None
    messages = [*system(rng, 0.1), user(prompt), assistant(answer, reasoning)]
    return finish(rng, "json_extract", messages, thinking, answer, (("person", name, city),))


def _named(rng: Random) -> str:
    return nonsense(rng).capitalize() if rng.random() < 0.25 else rng.choice(NAMES)


def _nested(rng: Random) -> Item:
    name, age, things = _named(rng), rng.randint(5, 95), rng.sample(OBJECTS, rng.randint(1, 4))
    city, place = rng.choice(CITIES), rng.choice(PLACES)
    listed = f"{', '.join(things[:-1])} and {things[-1]}" if things[1:] else things[0]
    result: dict[str, Any]
    if rng.random() < 0.5:
        text = f"{name} is {age} years old and has these things: {listed}."
        result, shape = {"name": name, "age": age, "things": things}, "name, age and a list things"
    else:
        text = f"{name} is {age} years old and lives near the {place} in {city}."
        home = {"city": city, "place": place}
        result, shape = {"name": name, "age": age, "home": home}, "name, age and home (city, place)"
    order = rng.choice(("Extract {} as JSON.", "Give me {} as JSON.", "Write JSON with {}."))
    ask = "\n".join(rng.sample((order.format(shape), text), 2))
    why = ", ".join(f"{key}: {json.dumps(value)}" for key, value in result.items()) + "."
    answer = json.dumps(result)
    return Item(ask, why, answer, answer, ("nested", name, age, *list(result)[2:]))


json_nested = generator("json_nested", _nested, think=0.25, most=3)
"""A sentence about a person, to be turned into JSON that has a list or an object in it."""


def _converted(rng: Random) -> Item:
    fields = rng.sample(("name", "age", "city", "job", "color"), rng.randint(2, 3))

    def row() -> dict[str, Any]:
        whole = {
            "name": _named(rng), "age": rng.randint(5, 95), "city": rng.choice(CITIES),
            "job": rng.choice(JOBS), "color": rng.choice(COLORS),
        }  # fmt: skip
        return {field: whole[field] for field in fields}

    rows = [row() for _ in range(rng.randint(1, 3))]
    lines = "\n".join(f"{key}: {value}" for key, value in rows[0].items())
    table = [fields, *([str(row[field]) for field in fields] for row in rows)]
    csv = "\n".join(",".join(cells) for cells in table)
    kind = rng.randrange(5)
    why = f"The keys are {', '.join(fields)}."
    if kind == 0:
        ask, answer = f"Write this as JSON.\n{lines}", json.dumps(rows[0])
    elif kind == 1:
        ask, answer = f"Convert this CSV to JSON.\n{csv}", json.dumps(rows)
    elif kind == 2:
        ask, answer = f"Convert this JSON to CSV.\n{json.dumps(rows)}", csv
    elif kind == 3:
        ask, answer = f"Write this JSON as lines.\n{json.dumps(rows[0])}", lines
    else:
        field = rng.choice(fields)
        ask = f"What is the {field} in this JSON?\n{json.dumps(rows[0])}"
        why, answer = f"I look for {field}.", json.dumps(rows[0][field])
    return Item(ask, why, answer, answer, ("convert", *rows[0].values()))


json_convert = generator("json_convert", _converted, think=0.2, most=3)
"""JSON from lines and CSV, and lines, CSV and single values from JSON."""

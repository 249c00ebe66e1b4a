"""Facts hidden in filler: finding one, finding several, finding a key among thousands."""

from __future__ import annotations

import math
import re
from random import Random

from .document import Document, Split, assistant, draw, finish, held_out, system, user
from .phrases import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    COLORS,
    DAYS,
    FOODS,
    JOBS,
    MONTHS,
    NAMES,
    OBJECTS,
    PLACES,
    VERBS,
)

_NUMERIC = ("code", "number", "key", "password", "score")
_WORDS: tuple[tuple[str, list[str]], ...] = (
    ("color", COLORS),
    ("animal", ANIMALS),
    ("fruit", FOODS),
    ("city", CITIES),
    ("secret word", OBJECTS),
)
_ALONE = ("secret code", "magic number", "password", "secret number", "special key")
_ASK = (
    "What is the {k}?",
    "What is the {k}?",
    "What is the {k}?",
    "Tell me the {k}.",
    "What was the {k}?",
    "Do you know the {k}?",
    "Question: What is the {k}?",
    "Please tell me the {k}.",
)
_SAY = ("The {f}",) * 12 + ("Remember: the {f}", "Note that the {f}", "It is known that the {f}")
_BEFORE = (
    "",
    "Read the text and answer the question.",
    "Here is a text.",
    "Remember this text.",
    "Read this and find the answer.",
)
_PIECE = re.compile(r" (?=\d)|\d|[^\W\d]+|[^\w\s]")


def count_pieces(text: str) -> int:
    """Words, digits and marks in a text: its tokens, if the vocabulary knows every word."""
    return len(_PIECE.findall(text))


_SYLLABLES = "ka lo mi ra te no vi su da pe ri mo la ne to".split()


def nonsense(rng: Random) -> str:
    """A word the model has hardly seen, so that it learns to copy and to ignore any word."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))


def a_noun(noun: str) -> str:
    """The noun with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def filler(rng: Random) -> str:
    """One sentence without digits."""
    c, kind = rng.choice, rng.randrange(9)
    if kind == 0:
        return f"The {c(ADJECTIVES)} {c(ANIMALS)} {c(VERBS)} near the {c(PLACES)}."
    if kind == 1:
        return f"{c(NAMES)} went to the {c(PLACES)} and saw {a_noun(c(ADJECTIVES))} {c(OBJECTS)}."
    if kind == 2:
        return f"It was {a_noun(c(ADJECTIVES))} day and the {c(PLACES)} was {c(ADJECTIVES)}."
    if kind == 3:
        one, two = rng.sample(NAMES, 2)
        return f"On {c(DAYS)} {one} and {two} talked about the {c(OBJECTS)}."
    if kind == 4:
        return f"Many people like the {c(ADJECTIVES)} {c(OBJECTS)} in {c(CITIES)}."
    if kind == 5:
        return f"The {c(JOBS)} bought {a_noun(c(FOODS))} and {a_noun(c(COLORS))} {c(OBJECTS)}."
    if kind == 6:
        one, two = rng.sample(ANIMALS, 2)
        return f"In {c(MONTHS)} the {one} and the {two} {c(VERBS)} by the {c(PLACES)}."
    if kind == 7:
        return f"{c(NAMES)} is a {c(JOBS)} and lives near the {c(PLACES)}."
    return f"There is {a_noun(c(OBJECTS))} on the {c(ADJECTIVES)} {c(OBJECTS)}."


def _fact(rng: Random, split: Split, attribute: str | None, alone: bool) -> tuple[str, str, str]:
    """(what is known, its value, its owner): ("code of Anna", "4821", "Anna")."""

    def sample() -> tuple[str, str, str]:
        name = attribute or rng.choice(_NUMERIC + tuple(w for w, _ in _WORDS))
        bank = dict(_WORDS).get(name)
        if alone:
            name = owner = rng.choice(_ALONE)
            bank = OBJECTS if name == "password" and rng.random() < 0.5 else None
        else:
            owner = rng.choice(NAMES) if rng.random() < 0.6 else f"the {rng.choice(OBJECTS)}"
        n = rng.choice((2, 3, 3, 4, 4, 4))
        value = rng.choice(bank) if bank else str(rng.randrange(10 ** (n - 1), 10**n))
        if value in owner:  # "the secret word of the book is book" could not be checked
            return sample()
        return (name if alone else f"{name} of {owner}"), value, owner

    return draw(split, sample, lambda f: ("fact", f[2], f[1]))


def _ask(rng: Random, what: str) -> str:
    attribute, _, owner = what.partition(" of ")
    if owner in NAMES and rng.random() < 0.1:
        return f"What is {owner}'s {attribute}?"
    return rng.choice(_ASK).format(k=what)


def _hidden(rng: Random, before: str, said: list[str], length: int) -> str:
    """``before`` and filler of about ``length`` tokens with the sentences ``said`` in it."""
    used = sum(map(count_pieces, (*said, before))) + 4
    text: list[str] = []
    while used < length - 5:
        if rng.random() < 0.05:
            words = [nonsense(rng) for _ in range(rng.randint(3, 7))]
            text.append(" ".join(words).capitalize() + ".")
            used += len("".join(words)) // 2 + 2  # about one token for a syllable
        else:
            text.append(filler(rng))
            used += count_pieces(text[-1])
    for stated in said:
        text.insert(rng.randint(0, len(text)), stated)
    return "\n".join(part for part in (before, " ".join(text)) if part)


def _some_length(rng: Random, shortest: int, longest: int) -> int:
    """Log-triangular between the two: most are short."""
    top = max(longest, round(1.5 * shortest))
    mode = shortest * (top / shortest) ** 0.35
    return round(math.exp(rng.triangular(math.log(shortest), math.log(top), math.log(mode))))


def _needles(
    rng: Random, split: Split, keys: int, attribute: str | None, alone: bool = False
) -> dict[str, tuple[str, tuple[object, ...]]]:
    """``keys`` different facts: what is known -> (its value, the key it is held out by)."""
    known: dict[str, tuple[str, tuple[object, ...]]] = {}
    while len(known) < keys:
        what, value, owner = _fact(rng, split, attribute, alone)
        if what not in known and all(value != other for other, _ in known.values()):
            known[what] = value, ("fact", owner, value)
    return known


def recall(
    rng: Random,
    split: Split = "train",
    *,
    length: int | None = None,
    longest: int = 2000,
    keys: int | None = None,
    thinking: bool | None = None,
) -> Document:
    """Facts at random depths of a text, then questions about some of them.

    ``length`` is the wanted number of tokens of the first prompt (by default 40 to ``longest``,
    most of them short); ``keys`` how many facts the text holds (by default one in half of the
    documents, else 2 to 8). With one key there is one question; without thinking a text with
    more keys is asked about several times, because a question costs far less than a text.
    """
    thinking = rng.random() < 0.2 if thinking is None else thinking
    length = length or _some_length(rng, 40, longest)
    if keys is None:
        keys = 1 if rng.random() < 0.4 else rng.randint(2, min(8, max(2, length // 15)))
    kinds = _NUMERIC + tuple(w for w, _ in _WORDS)
    attribute = rng.choice(kinds) if rng.random() < 0.5 else None
    needles = _needles(rng, split, keys, attribute, keys == 1 and rng.random() < 0.25)
    known = {what: value for what, (value, _) in needles.items()}
    sentences = {what: f"The {what} is {value}." for what, value in known.items()}
    said = [rng.choice(_SAY).format(f=sentence[4:]) for sentence in sentences.values()]
    asked = rng.sample(list(known), min(keys, 1 if thinking else rng.randint(1, 5)))
    question, before, messages = _ask(rng, asked[0]), rng.choice(_BEFORE), system(rng, 0.1)
    around = sum(map(count_pieces, (question, *(m["content"] for m in messages))))
    text = _hidden(rng, before, said, length - around)
    messages.append(user(f"{text}\n{question}"))
    for n, what in enumerate(asked):
        if n:
            messages.append(user(_ask(rng, what)))
        reasoning = f"The text says: {sentences[what]}" if thinking else None
        messages.append(assistant(sentences[what], reasoning))
    facts = tuple(fact for _, fact in needles.values())
    return finish(rng, "recall", messages, thinking, known[asked[-1]], facts)


def multi_needle(
    rng: Random,
    split: Split = "train",
    *,
    length: int | None = None,
    longest: int = 2000,
    thinking: bool | None = None,
) -> Document:
    """One question about 2 to 4 of 3 to 8 facts of a kind, far apart in a text.

    ``length`` is the wanted number of tokens of the prompt, as in ``recall``.
    """
    thinking = rng.random() < 0.2 if thinking is None else thinking
    length = length or _some_length(rng, 80, longest)
    attribute = rng.choice(_NUMERIC)
    needles = _needles(rng, split, rng.randint(3, min(8, max(3, length // 20))), attribute)
    said = [f"The {what} is {value}." for what, (value, _) in needles.items()]
    asked = rng.sample(list(needles), rng.randint(2, min(4, len(needles))))
    owners = [what.partition(" of ")[2] for what in asked]
    wanted = f"the {attribute} of {', of '.join(owners[:-1])} and of {owners[-1]}"
    question = rng.choice(("What is {}?", "Tell me {}.", "Find {}.")).format(wanted)
    text = _hidden(rng, rng.choice(_BEFORE), said, length - count_pieces(question))
    reply = " ".join(f"The {what} is {needles[what][0]}." for what in asked)
    why = f"I look for {', '.join(owners)}." if thinking else None
    messages = [*system(rng, 0.1), user(f"{text}\n{question}"), assistant(reply, why)]
    facts = tuple(fact for _, fact in needles.values())
    answer = ", ".join(needles[what][0] for what in asked)
    return finish(rng, "multi_needle", messages, thinking, answer, facts)


def key_value(
    rng: Random,
    split: Split = "train",
    *,
    length: int | None = None,
    longest: int = 2000,
    turns: int | None = None,
    thinking: bool | None = None,
) -> Document:
    """A list of made-up words with a number each, then 1 to 8 questions for the number of one.

    ``length`` is the wanted number of tokens of the list, as in ``recall``; a line has some 8.
    """
    thinking = rng.random() < 0.1 if thinking is None else thinking
    length = length or _some_length(rng, 60, longest)
    table: dict[str, str] = {}
    used = 20
    while used < length - 4:
        key = nonsense(rng) + (nonsense(rng) if length > 400 else "")
        value = str(rng.randrange(10, 10 ** rng.randint(2, 4)))
        if key not in table and held_out("value", key, value) == (split == "heldout"):
            table[key] = value
            used += len(key) // 3 + len(value) + 3
    text = "\n".join(f"{key} = {value}" for key, value in table.items())
    turns = turns or (1 if thinking else rng.randint(1, 8))
    asked = rng.sample(list(table), min(turns, len(table)))
    messages = system(rng, 0.05)
    for n, key in enumerate(asked):
        question = rng.choice(("What is the value of {}?", "What is {}?", "{} = ?")).format(key)
        why = f"The list says: {key} = {table[key]}." if thinking else None
        messages.append(user(question if n else f"{text}\n{question}"))
        messages.append(assistant(f"The value of {key} is {table[key]}.", why))
    facts = tuple(("value", *pair) for pair in table.items())
    return finish(rng, "key_value", messages, thinking, table[asked[-1]], facts)

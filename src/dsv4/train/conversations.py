"""The conversations v4-nano learns from, made by chance and rule: six tasks, one function each.

``arithmetic`` (addition and subtraction, with or without written steps), ``number_facts`` (the
one-digit sums that the steps are made of), ``recall`` (facts hidden in filler), ``json_extract``,
``tool_call`` (a declared calculator) and ``dialogue`` (small talk and simple facts), all in the
official message format.

About a tenth of all operand pairs, facts, people and conversations is *held out* by a hash: the
``train`` split never shows one, the ``heldout`` split shows nothing else. Evaluations draw from it.
The vocabulary is small and every answer has one fixed form, because the model is small too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from random import Random
from typing import Any, Literal, TypeVar

from .phrases import (
    ADJECTIVES,
    ANIMALS,
    CAPITALS,
    CITIES,
    COLORS,
    DAYS,
    FOODS,
    JOBS,
    MONTHS,
    NAMES,
    OBJECTS,
    OPPOSITES,
    PLACES,
    SOUNDS,
    SYSTEM,
    THINGS,
    VERBS,
    WHO,
)

Message = dict[str, Any]
Split = Literal["train", "heldout"]
T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """One conversation that ends with an assistant message.

    ``messages`` are in the official format (``tools`` on the system message). ``answer`` is what a
    checker compares with: the number, the value, the JSON object or the last reply. ``facts`` are
    the hashed keys of everything in it that can be held out.
    """

    messages: list[Message]
    thinking_mode: str
    reasoning_effort: str | None
    task: str
    answer: str
    facts: tuple[tuple[object, ...], ...]


# ------------------------------------------------------------------ chance, and what is held out


def rng_for(*key: object) -> Random:
    """A generator that depends on the key alone, on every machine and Python."""
    return Random(int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little"))


@lru_cache(maxsize=1 << 17)
def held_out(*key: object) -> bool:
    """True for about one key in ten, always the same ones."""
    digest = blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 10 == 0


def pair_key(a: int, b: int) -> tuple[object, ...]:
    """The key of two operands, whatever their order and the operation."""
    return ("pair", min(a, b), max(a, b))


def _draw(split: Split, sample: Callable[[], T], key: Callable[[T], tuple[object, ...]]) -> T:
    """Sample until the key belongs to the split."""
    while True:
        x = sample()
        if held_out(*key(x)) == (split == "heldout"):
            return x


# ------------------------------------------------------------------ messages


def _system(rng: Random, share: float = 0.2) -> list[Message]:
    return [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < share else []


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(content: str, reasoning: str | None = None) -> Message:
    message: Message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    return message


def _document(
    rng: Random,
    task: str,
    messages: list[Message],
    thinking: bool,
    answer: str,
    facts: tuple[tuple[object, ...], ...],
) -> Document:
    effort = "max" if thinking and rng.random() < 0.05 else None
    return Document(messages, "thinking" if thinking else "chat", effort, task, answer, facts)


# ------------------------------------------------------------------ arithmetic

_ADD = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "{a} + {b} = ?",
    "{a}+{b}=?",
    "{a} + {b}",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "Add {a} to {b}.",
    "Compute {a} + {b}.",
    "Compute {a} plus {b}.",
    "Calculate {a} + {b}.",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "Please add {a} and {b}.",
    "Can you tell me {a} + {b}?",
)
_SUBTRACT = (
    "What is {a} - {b}?",
    "What is {a} - {b}?",
    "{a} - {b} = ?",
    "{a}-{b}=?",
    "{a} - {b}",
    "What is {a} minus {b}?",
    "Subtract {b} from {a}.",
    "Take {b} away from {a}.",
    "Compute {a} - {b}.",
    "Compute {a} minus {b}.",
    "Calculate {a} - {b}.",
    "How much is {a} - {b}?",
    "How much is {a} minus {b}?",
    "Please compute {a} minus {b}.",
    "Can you tell me {a} - {b}?",
)
_COLUMNS = ("units", "tens", "hundreds", "thousands")


def worked_steps(a: int, op: str, b: int) -> str:
    """The written steps of ``a + b`` or ``a - b`` (both >= 0), units first, in one fixed form.

    ``47 + 85. units: 7+5=12, write 2, carry 1. tens: 4+8+1=13, write 3, carry 1. Result: 132.``
    """
    value = a + b if op == "+" else a - b
    out = [f"{a} {op} {b}."]
    if op == "-" and a < b:
        a, b = b, a
        out = [f"{out[0][:-1]} is negative. {a} - {b}."]
    carry = 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        last = f"{op}{carry}" if i else ""
        if op == "+":
            s = x + y + carry
            carry = s // 10
            out.append(f"{_COLUMNS[i]}: {x}+{y}{last}={s}, write {s % 10}, carry {carry}.")
        else:
            borrow = int(x < y + carry)
            s = x + 10 * borrow - y - carry
            out.append(f"{_COLUMNS[i]}: {x + 10 * borrow}-{y}{last}={s}, borrow {borrow}.")
            carry = borrow
    return " ".join([*out, f"Result: {value}."])


def _digits(rng: Random) -> tuple[int, int]:
    r = rng.random()
    if r < 0.78:
        return 2, 2
    return (rng.randint(1, 2), rng.randint(1, 2)) if r < 0.89 else (rng.randint(1, 3), 3)


def arithmetic(
    rng: Random,
    split: Split = "train",
    *,
    digits: tuple[int, int] | None = None,
    turns: int | None = None,
    thinking: bool | None = None,
) -> Document:
    """Additions and subtractions of two numbers; with thinking one, otherwise 1 to 3 in turn."""
    thinking = rng.random() < 0.65 if thinking is None else thinking
    turns = turns or (1 if thinking else rng.choice((1, 1, 2, 3)))
    messages, facts, answer = _system(rng, 0.15), [], ""

    def sample() -> tuple[int, int]:
        sizes = list(digits or _digits(rng))
        rng.shuffle(sizes)
        a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in sizes)
        return a, b

    for _ in range(turns):
        a, b = _draw(split, sample, lambda p: pair_key(*p))
        op = rng.choice("+-")
        question = rng.choice(_ADD if op == "+" else _SUBTRACT).format(a=a, b=b)
        answer = str(a + b if op == "+" else a - b)
        steps = worked_steps(a, op, b) if thinking else None
        messages += [_user(question), _assistant(f"{a} {op} {b} = {answer}.", steps)]
        facts.append(pair_key(a, b))
    return _document(rng, "arithmetic", messages, thinking, answer, tuple(facts))


def number_facts(rng: Random, split: Split = "train") -> Document:
    """The one-digit sums and differences of worked steps, many in one document.

    Nothing of it is held out: whoever adds two-digit numbers has to know all of them.
    """
    asked, known = [], []
    for _ in range(rng.randint(6, 24)):
        op, y, last = rng.choice("+-"), rng.randrange(10), rng.choice(("", "0", "1"))
        rest = y + int(last or 0)
        x = rng.randrange(10) + (rest if op == "-" else 0)
        sum_ = f"{x}{op}{y}" + (f"{op}{last}" if last else "")
        asked.append(f"{sum_}=?")
        known.append(f"{sum_}={x + rest if op == '+' else x - rest}.")
    messages = [*_system(rng, 0.05), _user(" ".join(asked)), _assistant(" ".join(known))]
    return _document(rng, "number_facts", messages, False, known[-1], ())


# ------------------------------------------------------------------ recall

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


def _nonsense(rng: Random) -> str:
    """A word the model has hardly seen, so that it learns to copy and to ignore any word."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _filler(rng: Random) -> str:
    """One sentence without digits."""
    c, kind = rng.choice, rng.randrange(9)
    if kind == 0:
        return f"The {c(ADJECTIVES)} {c(ANIMALS)} {c(VERBS)} near the {c(PLACES)}."
    if kind == 1:
        return f"{c(NAMES)} went to the {c(PLACES)} and saw {_a(c(ADJECTIVES))} {c(OBJECTS)}."
    if kind == 2:
        return f"It was {_a(c(ADJECTIVES))} day and the {c(PLACES)} was {c(ADJECTIVES)}."
    if kind == 3:
        one, two = rng.sample(NAMES, 2)
        return f"On {c(DAYS)} {one} and {two} talked about the {c(OBJECTS)}."
    if kind == 4:
        return f"Many people like the {c(ADJECTIVES)} {c(OBJECTS)} in {c(CITIES)}."
    if kind == 5:
        return f"The {c(JOBS)} bought {_a(c(FOODS))} and {_a(c(COLORS))} {c(OBJECTS)}."
    if kind == 6:
        one, two = rng.sample(ANIMALS, 2)
        return f"In {c(MONTHS)} the {one} and the {two} {c(VERBS)} by the {c(PLACES)}."
    if kind == 7:
        return f"{c(NAMES)} is a {c(JOBS)} and lives near the {c(PLACES)}."
    return f"There is {_a(c(OBJECTS))} on the {c(ADJECTIVES)} {c(OBJECTS)}."


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

    return _draw(split, sample, lambda f: ("fact", f[2], f[1]))


def _ask(rng: Random, what: str) -> str:
    attribute, _, owner = what.partition(" of ")
    if owner in NAMES and rng.random() < 0.1:
        return f"What is {owner}'s {attribute}?"
    return rng.choice(_ASK).format(k=what)


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
    if length is None:
        top = max(longest, 60)
        mode = 40 * (top / 40) ** 0.35
        length = round(math.exp(rng.triangular(math.log(40), math.log(top), math.log(mode))))
    if keys is None:
        keys = 1 if rng.random() < 0.4 else rng.randint(2, min(8, max(2, length // 15)))
    kinds = _NUMERIC + tuple(w for w, _ in _WORDS)
    attribute = rng.choice(kinds) if rng.random() < 0.5 else None
    known: dict[str, str] = {}
    facts: list[tuple[object, ...]] = []
    while len(known) < keys:
        what, value, owner = _fact(rng, split, attribute, keys == 1 and rng.random() < 0.25)
        if what not in known and value not in known.values():
            known[what] = value
            facts.append(("fact", owner, value))
    sentences = {what: f"The {what} is {value}." for what, value in known.items()}
    said = [rng.choice(_SAY).format(f=sentence[4:]) for sentence in sentences.values()]
    asked = rng.sample(list(known), min(keys, 1 if thinking else rng.randint(1, 5)))
    question, before = _ask(rng, asked[0]), rng.choice(_BEFORE)
    system = _system(rng, 0.1)
    used = sum(map(count_pieces, (*said, question, before))) + 4
    used += sum(count_pieces(m["content"]) for m in system)
    text: list[str] = []
    while used < length - 5:
        if rng.random() < 0.05:
            words = [_nonsense(rng) for _ in range(rng.randint(3, 7))]
            text.append(" ".join(words).capitalize() + ".")
            used += len("".join(words)) // 2 + 2  # about one token for a syllable
        else:
            text.append(_filler(rng))
            used += count_pieces(text[-1])
    for stated in said:
        text.insert(rng.randint(0, len(text)), stated)
    first = "\n".join(part for part in (before, " ".join(text), question) if part)
    messages = [*system, _user(first)]
    for n, what in enumerate(asked):
        if n:
            messages.append(_user(_ask(rng, what)))
        reasoning = f"The text says: {sentences[what]}" if thinking else None
        messages.append(_assistant(sentences[what], reasoning))
    return _document(rng, "recall", messages, thinking, known[asked[-1]], tuple(facts))


# ------------------------------------------------------------------ JSON

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
            name = _nonsense(rng).capitalize()
        cities = CITIES if rng.random() < 0.6 else tuple(CAPITALS.values())
        return name, rng.choice(cities)

    name, city = _draw(split, sample, lambda p: ("person", *p))
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
    messages = [*_system(rng, 0.1), _user(prompt), _assistant(answer, reasoning)]
    return _document(rng, "json_extract", messages, thinking, answer, (("person", name, city),))


# ------------------------------------------------------------------ tools


def _tool(name: str, description: str, parameter: str, what: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {parameter: {"type": "string", "description": what}},
        "required": [parameter],
    }
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


CALCULATOR = _tool(
    "calculator", "Evaluate an arithmetic expression", "expression", "The expression"
)
GET_TIME = _tool("get_time", "Get the time in a city", "city", "The city name")
GET_WEATHER = _tool("get_weather", "Get the weather in a city", "city", "The city name")
_SKIES = ("sunny", "cloudy", "rainy", "windy", "snowy")


def _calculator(rng: Random) -> dict[str, Any]:
    """The calculator, described in other words, now and then under another name."""
    if rng.random() < 0.4:
        return CALCULATOR
    return _tool(
        rng.choice(("calculator",) * 5 + ("calculate", "calc", "math")),
        rng.choice(
            (
                "Evaluate an arithmetic expression",
                "Evaluates a mathematical expression.",
                "A calculator for arithmetic.",
                "Calculate the value of an expression",
                "Compute the result of a math expression and return it",
            )
        ),
        rng.choice(("expression",) * 5 + ("expr", "input")),
        rng.choice(("The expression", "The expression to evaluate", "for example 12 * 34")),
    )


_MULTIPLY = (
    "What is {a} * {b}?",
    "What is {a} times {b}?",
    "Multiply {a} by {b}.",
    "Compute {a} * {b}.",
    "Compute {a} times {b}.",
    "Calculate {a} * {b}.",
    "How much is {a} * {b}?",
    "{a} * {b} = ?",
    "Use the calculator: {a} * {b}",
    "What is the product of {a} and {b}?",
    "What is {a} x {b}?",
)


def _problem(rng: Random, split: Split) -> tuple[str, str, str, tuple[object, ...]]:
    """(question, expression, result, key) of a product, or a sum or difference of any size."""
    op = rng.choice("***++-")

    def sample() -> tuple[int, int]:
        sizes = (2, 3, 3) if op == "*" else (2, 3, 4, 4, 5)
        n, m = rng.choice(sizes), rng.choice(sizes)
        return rng.randrange(10 ** (n - 1), 10**n), rng.randrange(10 ** (m - 1), 10**m)

    a, b = _draw(split, sample, lambda p: pair_key(*p))
    bank = {"*": _MULTIPLY, "+": _ADD, "-": _SUBTRACT}[op]
    result = {"*": a * b, "+": a + b, "-": a - b}[op]
    return rng.choice(bank).format(a=a, b=b), f"{a} {op} {b}", str(result), pair_key(a, b)


def tool_call(
    rng: Random,
    split: Split = "train",
    *,
    need: bool | None = None,
    turns: int | None = None,
    thinking: bool | None = None,
) -> Document:
    """1 to 3 questions with a calculator declared; ``need`` makes all of them (not) need it.

    Every calculation goes to the calculator. Some documents declare a second tool.
    """
    thinking = rng.random() < 0.5 if thinking is None else thinking
    turns = turns or rng.randint(1, 3)
    calculator = _calculator(rng)
    other = rng.choice((GET_TIME, GET_WEATHER)) if rng.random() < 0.4 else None
    tools = [tool for tool in (calculator, other) if tool]
    rng.shuffle(tools)
    content = "" if rng.random() < 0.5 else rng.choice(SYSTEM)
    messages: list[Message] = [{"role": "system", "content": content, "tools": tools}]
    facts: list[tuple[object, ...]] = []
    answer = ""

    def call(name: str, arguments: dict[str, str], result: str, why: str, reply: str) -> None:
        identity = f"call_{len(messages)}"
        function = {"name": name, "arguments": json.dumps(arguments)}
        message = _assistant("", why if thinking else None)
        message["tool_calls"] = [{"id": identity, "type": "function", "function": function}]
        messages.append(message)
        messages.append({"role": "tool", "tool_call_id": identity, "content": result})
        messages.append(_assistant(reply, f"The result is {result}." if thinking else None))

    def plain() -> Exchange:
        return rng.choice(_PLAIN)(rng)[0]

    for _ in range(turns):
        needed = rng.random() < 0.65 if need is None else need
        asks: tuple[str, ...]
        if needed and other and need is None and rng.random() < 0.35:
            name, city = other["function"]["name"], rng.choice(CITIES)
            if other is GET_TIME:
                answer = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
                asks = ("What time is it in {}?", "Tell me the time in {}.", "The time in {}?")
                reply = f"It is {answer} in {city}."
            else:
                answer = rng.choice(_SKIES)
                asks = ("What is the weather in {}?", "How is the weather in {}?")
                reply = f"The weather in {city} is {answer}."
            messages.append(_user(rng.choice(asks).format(city)))
            call(name, {"city": city}, answer, f"I need {name} for {city}.", reply)
        elif needed:
            question, expression, answer, key = _problem(rng, split)
            messages.append(_user(question))
            function = calculator["function"]
            parameter = function["parameters"]["required"][0]
            why = f"I need the {function['name']} for {expression}."
            reply = f"{expression} = {answer}."
            call(function["name"], {parameter: expression}, answer, why, reply)
            facts.append(key)
        else:
            question, _, answer = _draw(split, plain, lambda e: ("talk", e[0]))
            why = "I do not need a tool." if thinking else ""
            messages += [_user(question), _assistant(answer, why or None)]
    return _document(rng, "tool_call", messages, thinking, answer, tuple(facts))


# ------------------------------------------------------------------ dialogue

Exchange = tuple[str, str, str]  # what the user says, a line of reasoning, the reply


def _greeting(rng: Random) -> list[Exchange]:
    hello = rng.choice(("Hello", "Hi", "Hey", "Good morning", "Good evening", "Hello there"))
    back = "Hello" if hello in ("Hi", "Hey", "Hello there") else hello
    more = rng.choice((" How can I help you?", " What can I do for you?", " How are you?"))
    reply = f"{back}!{more}"
    return [(hello + rng.choice(("!", ".", "")), "The user greets me. I greet back.", reply)]


def _who(rng: Random) -> list[Exchange]:
    ask = rng.choice(
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "What model are you?",
            "Tell me who you are.",
            "Are you a human?",
            "Are you a person?",
            "Are you ChatGPT?",
            "Are you DeepSeek-V4-Flash?",
            "Are you DeepSeek-V4-Pro?",
            "Introduce yourself.",
        )
    )
    reply = rng.choice(WHO)
    return [(ask, "The user asks who I am.", f"No. {reply}" if ask.startswith("Are") else reply)]


def _wellbeing(rng: Random) -> list[Exchange]:
    ask = rng.choice(("How are you?", "How are you today?", "How do you do?", "Are you well?"))
    reply = rng.choice(("I am fine, thank you.", "I am well, thank you.", "Very well, thank you."))
    return [(ask, "The user asks how I am.", reply + rng.choice(("", " And you?")))]


def _help(rng: Random) -> list[Exchange]:
    ask = rng.choice(("What can you do?", "Can you help me?", "How can you help me?", "Help!"))
    reply = "I can add and subtract, find facts in a text, write JSON and answer simple questions."
    return [(ask, "The user asks what I can do.", reply)]


def _thanks(rng: Random) -> list[Exchange]:
    ask = rng.choice(("Thank you", "Thanks", "Thanks a lot", "Thank you so much", "Great, thanks"))
    reply = rng.choice(("You are welcome!", "You are welcome. I am glad to help."))
    return [(ask + rng.choice(("!", ".", "")), "The user thanks me.", reply)]


def _bye(rng: Random) -> list[Exchange]:
    ask = rng.choice(("Goodbye", "Bye", "See you later", "Good night", "I have to go now"))
    reply = rng.choice(("Goodbye!", "Goodbye! Have a nice day.", "See you soon!"))
    return [(ask + rng.choice(("!", ".", "")), "The user says goodbye.", reply)]


def _table(
    table: Mapping[str, str], asks: tuple[str, ...], again: tuple[str, ...], line: str
) -> Callable[[Random], list[Exchange]]:
    """Questions about a table of facts, a follow-up that leaves the relation out now and then."""

    def exchanges(rng: Random) -> list[Exchange]:
        keys = rng.sample(list(table), 2 if rng.random() < 0.35 else 1)
        out = []
        for n, key in enumerate(keys):
            reply = line.format(k=key, v=table[key])
            reply = reply[0].upper() + reply[1:]
            out.append((rng.choice(again if n else asks).format(k=key), reply, reply))
        return out

    return exchanges


def _after(names: list[str], step: int) -> dict[str, str]:
    return {name: names[(i + step) % len(names)] for i, name in enumerate(names)}


_capital = _table(
    CAPITALS,
    (
        "What is the capital of {k}?",
        "What is the capital city of {k}?",
        "Tell me the capital of {k}.",
        "Which city is the capital of {k}?",
        "Do you know the capital of {k}?",
        "Capital of {k}?",
    ),
    ("And of {k}?", "And the capital of {k}?", "What about {k}?", "And {k}?"),
    "the capital of {k} is {v}.",
)
_country = _table(
    {city: country for country, city in CAPITALS.items()},
    ("{k} is the capital of which country?", "Which country has the capital {k}?"),
    ("And {k}?", "What about {k}?"),
    "{k} is the capital of {v}.",
)
_color = _table(
    THINGS,
    (
        "What color is the {k}?",
        "What is the color of the {k}?",
        "Which color has the {k}?",
        "Tell me the color of the {k}.",
    ),
    ("And the {k}?", "What about the {k}?"),
    "the {k} is {v}.",
)
_sound = _table(
    SOUNDS,
    ("What does the {k} say?", "What sound does a {k} make?", "Which sound does the {k} make?"),
    ("And the {k}?", "What about the {k}?"),
    "the {k} says {v}.",
)
_opposite = _table(
    OPPOSITES,
    ("What is the opposite of {k}?", "Tell me the opposite of {k}.", "The opposite of {k}?"),
    ("And of {k}?", "And the opposite of {k}?", "What about {k}?"),
    "the opposite of {k} is {v}.",
)
_day_after = _table(
    _after(DAYS, 1),
    ("What day comes after {k}?", "Which day is after {k}?", "What is the day after {k}?"),
    ("And after {k}?", "What about {k}?"),
    "after {k} comes {v}.",
)
_day_before = _table(
    _after(DAYS, -1),
    ("What day comes before {k}?", "Which day is before {k}?", "What is the day before {k}?"),
    ("And before {k}?", "What about {k}?"),
    "before {k} comes {v}.",
)
_month_after = _table(
    _after(MONTHS, 1),
    ("What month comes after {k}?", "Which month is after {k}?", "What is the month after {k}?"),
    ("And after {k}?", "What about {k}?"),
    "after {k} comes {v}.",
)
_simple = _table(
    {
        "How many days are in a week?": "A week has 7 days.",
        "How many days does a week have?": "A week has 7 days.",
        "How many months are in a year?": "A year has 12 months.",
        "How many months does a year have?": "A year has 12 months.",
        "How many hours are in a day?": "A day has 24 hours.",
        "How many hours does a day have?": "A day has 24 hours.",
        "How many minutes are in an hour?": "An hour has 60 minutes.",
        "How many legs does a dog have?": "A dog has 4 legs.",
        "How many legs does a bird have?": "A bird has 2 legs.",
        "How many legs does a spider have?": "A spider has 8 legs.",
        "Is the sun hot?": "Yes, the sun is hot.",
        "Is ice hot?": "No, ice is cold.",
        "Is ice cold?": "Yes, ice is cold.",
        "Is fire cold?": "No, fire is hot.",
        "Can a bird fly?": "Yes, a bird can fly.",
        "Can a fish fly?": "No, a fish can swim.",
        "Can a fish swim?": "Yes, a fish can swim.",
        "What do cows eat?": "Cows eat grass.",
        "What do bees make?": "Bees make honey.",
        "Where do fish live?": "Fish live in water.",
        "What do we drink?": "We drink water.",
        "When does the sun shine?": "The sun shines during the day.",
        "What shines at night?": "The moon shines at night.",
    },
    ("{k}",),
    ("{k}",),
    "{v}",
)


def _unknown(rng: Random) -> list[Exchange]:
    ask = rng.choice(
        (
            "What will the weather be tomorrow?",
            "What is the weather in {c}?",
            "Who won the game yesterday?",
            "What is in my {o}?",
            "Where is my {o}?",
            "Where is {n} now?",
            "What did {n} say yesterday?",
            "How old is {n}?",
            "Who is the president of {k}?",
            "What is the news today?",
            "How many people live in {c}?",
            "Who wrote this {o}?",
            "What am I thinking?",
            "How much does a {o} cost?",
        )
    ).format(
        c=rng.choice(CITIES),
        o=rng.choice(OBJECTS),
        n=rng.choice(NAMES),
        k=rng.choice(tuple(CAPITALS)),
    )
    reply = rng.choice(("I don't know.", "I don't know that.", "I am sorry, I don't know."))
    return [(ask, "I do not know this.", reply)]


def _sum(rng: Random) -> list[Exchange]:
    said, reply = arithmetic(rng, turns=1, thinking=True).messages[-2:]
    return [(said["content"], reply["reasoning_content"], reply["content"])]


def _product(rng: Random) -> list[Exchange]:
    a, b = _draw("train", lambda: (rng.randint(2, 99), rng.randint(2, 99)), lambda p: pair_key(*p))
    reply = "I don't know. I need a calculator for that."
    return [(rng.choice(_MULTIPLY[:8]).format(a=a, b=b), "I can not multiply.", reply)]


def _my_name(rng: Random) -> list[Exchange]:
    name = rng.choice(NAMES)
    tell = rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}."))
    hello = rng.choice(("Nice to meet you, {}!", "Hello, {}!"))
    out = [(tell.format(name), f"The user is {name}.", hello.format(name))]
    if rng.random() < 0.6:
        out += rng.choice(_PLAIN)(rng)[:1] if rng.random() < 0.4 else []
        ask = rng.choice(("What is my name?", "Who am I?", "Do you know my name?"))
        out.append((ask, f"The user is {name}.", f"Your name is {name}."))
    return out


def _my_taste(rng: Random) -> list[Exchange]:
    kind, bank = rng.choice((("color", COLORS), ("animal", ANIMALS), ("fruit", FOODS)))
    value = rng.choice(bank)
    tell = rng.choice(("My favorite {} is {}.", "My favorite {} is the {}."))
    tell = "My favorite {} is {}." if kind == "color" else tell
    out = [
        (
            tell.format(kind, value),
            f"The favorite {kind} of the user is {value}.",
            rng.choice((f"I see, you like {value}.", f"Nice! Your favorite {kind} is {value}.")),
        )
    ]
    out += rng.choice(_PLAIN)(rng)[:1] if rng.random() < 0.3 else []
    ask = rng.choice((f"What is my favorite {kind}?", f"Which {kind} do I like?"))
    out.append((ask, f"The user said {value}.", f"Your favorite {kind} is {value}."))
    return out


_PLAIN: tuple[Callable[[Random], list[Exchange]], ...] = (
    _greeting,
    _who,
    _wellbeing,
    _thanks,
    _capital,
    _capital,
    _capital,
    _country,
    _color,
    _sound,
    _opposite,
    _day_after,
    _day_before,
    _month_after,
    _simple,
)
_MORE = (_who, _help, _unknown, _unknown, _my_name, _my_name, _my_taste, _sum, _sum, _product)
_TOPICS = (*_PLAIN, *_MORE)


def dialogue(rng: Random, split: Split = "train", *, thinking: bool | None = None) -> Document:
    """Small talk and simple facts in 1 to 6 turns; whole conversations are held out."""
    thinking = rng.random() < 0.4 if thinking is None else thinking

    def sample() -> list[Exchange]:
        talk = _greeting(rng) if rng.random() < 0.15 else []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            talk += rng.choice(_TOPICS)(rng)
        if rng.random() < 0.12:
            talk += rng.choice((_thanks, _bye))(rng)
        return talk

    def key(talk: list[Exchange]) -> tuple[object, ...]:
        return ("talk", *(said for said, _, _ in talk))

    talk = _draw(split, sample, key)
    messages = _system(rng, 0.25)
    for said, why, reply in talk:
        messages += [_user(said), _assistant(reply, why if thinking else None)]
    return _document(rng, "dialogue", messages, thinking, talk[-1][2], (key(talk),))


TASKS: Mapping[str, Callable[[Random, Split], Document]] = {
    "arithmetic": arithmetic,
    "number_facts": number_facts,
    "recall": recall,
    "json_extract": json_extract,
    "tool_call": tool_call,
    "dialogue": dialogue,
}

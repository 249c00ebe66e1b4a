"""Dialogue: small talk and simple facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from .dictionary import entry
from .document import Document, Exchange, Split, conversation, draw, pair_key, talk_key
from .knowledge import known
from .phrases import (
    ANIMALS,
    CAPITALS,
    CITIES,
    COLORS,
    DAYS,
    FOODS,
    MONTHS,
    NAMES,
    OBJECTS,
    OPPOSITES,
    SOUNDS,
    THINGS,
    WHO,
)
from .sums import MULTIPLY, arithmetic


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
    a, b = draw("train", lambda: (rng.randint(2, 99), rng.randint(10, 99)), lambda p: pair_key(*p))
    reply = "I don't know. I need a calculator for that."
    return [(rng.choice(MULTIPLY[:8]).format(a=a, b=b), "I can not multiply.", reply)]


def _known(rng: Random) -> list[Exchange]:
    it = draw("train", lambda: rng.choice((known, entry))(rng), lambda it: it.fact)
    return [(it.ask, it.why, it.reply)]


def _my_name(rng: Random) -> list[Exchange]:
    name = rng.choice(NAMES)
    tell = rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}."))
    hello = rng.choice(("Nice to meet you, {}!", "Hello, {}!"))
    out = [(tell.format(name), f"The user is {name}.", hello.format(name))]
    if rng.random() < 0.6:
        out += rng.choice(PLAIN)(rng)[:1] if rng.random() < 0.4 else []
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
    out += rng.choice(PLAIN)(rng)[:1] if rng.random() < 0.3 else []
    ask = rng.choice((f"What is my favorite {kind}?", f"Which {kind} do I like?"))
    out.append((ask, f"The user said {value}.", f"Your favorite {kind} is {value}."))
    return out


PLAIN: tuple[Callable[[Random], list[Exchange]], ...] = (
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
_MORE = (
    _who, _help, _unknown, _unknown, _known, _known, _known, _my_name, _my_name, _my_taste,
    _sum, _sum, _product,
)  # fmt: skip
_TOPICS = (*PLAIN, *_MORE)


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

    return conversation(rng, "dialogue", draw(split, sample, talk_key), thinking, 0.25)

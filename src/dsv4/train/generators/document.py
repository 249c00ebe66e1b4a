"""What a generated document is, which chance makes it, and what is held out.

About a tenth of all operand pairs, facts, people and questions is *held out* by a hash: the
``train`` split never shows one, the ``heldout`` split shows nothing else. Evaluations draw from it.

Most tasks are questions that have one right answer; for those a function ``(rng) -> Item`` is
enough, and ``generator`` makes documents of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from random import Random
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from .phrases import SYSTEM

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


def draw(split: Split, sample: Callable[[], T], key: Callable[[T], tuple[object, ...]]) -> T:
    """Sample until the key belongs to the split."""
    while True:
        x = sample()
        if held_out(*key(x)) == (split == "heldout"):
            return x


# ------------------------------------------------------------------ messages


def system(rng: Random, share: float = 0.2) -> list[Message]:
    """A system message, in a share of the documents."""
    return [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < share else []


def user(text: str) -> Message:
    """What the user says."""
    return {"role": "user", "content": text}


_SHORT = {"I am ": "I'm ", "do not ": "don't ", "can not ": "can't ", "It is ": "It's "}
_SHORT |= {"What is ": "What's ", "does not ": "doesn't ", "You are ": "You're "}


def typed(rng: Random, text: str) -> str:
    """Now and then the text as people type it: without capital and end mark, with short forms."""
    if rng.random() < 0.12:
        text = (text if text[:2] in ("I ", "I'") else text[0].lower() + text[1:]).rstrip(".!?")
    if rng.random() < 0.12:
        for long, short in _SHORT.items():
            text = text.replace(long, short)
    return text


def assistant(content: str, reasoning: str | None = None) -> Message:
    """What the assistant says, and thinks before."""
    message: Message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    return message


def finish(
    rng: Random,
    task: str,
    messages: list[Message],
    thinking: bool,
    answer: str,
    facts: tuple[tuple[object, ...], ...],
) -> Document:
    """The document; one in twenty of those with thinking asks for the greatest effort."""
    effort = "max" if thinking and rng.random() < 0.05 else None
    return Document(messages, "thinking" if thinking else "chat", effort, task, answer, facts)


# ------------------------------------------------------------------ conversations

Exchange = tuple[str, str, str]  # what the user says, a line of reasoning, the reply


def talk_key(talk: list[Exchange]) -> tuple[object, ...]:
    """The key of a whole conversation: what the user says in it."""
    return ("talk", *(said for said, _, _ in talk))


def conversation(
    rng: Random, task: str, talk: list[Exchange], thinking: bool, share: float
) -> Document:
    """Exchanges, worded as people type; a share of the documents has a system message."""
    messages = system(rng, share)
    for said, why, reply in talk:
        messages += [user(typed(rng, said)), assistant(reply, why if thinking else None)]
    return finish(rng, task, messages, thinking, talk[-1][2], (talk_key(talk),))


# ------------------------------------------------------------------ questions with one answer


class Item(NamedTuple):
    """One question and its only right answer.

    ``why`` is what a model may think before ``reply``; ``answer`` is what a checker looks for in
    it; ``fact`` is the key by which the question is held out, however it is worded.
    """

    ask: str
    why: str
    reply: str
    answer: str
    fact: tuple[object, ...]


class Generator(Protocol):
    """Makes a document of a split. With thinking there is one turn, otherwise 1 to 4."""

    def __call__(
        self,
        rng: Random,
        split: Split = "train",
        *,
        thinking: bool | None = None,
        turns: int | None = None,
    ) -> Document: ...


_OPERATION = re.compile(r"(\d+) ?(?:[-+*x]|plus|minus|times|by|to|and|from) ?(?=(\d+))")


def shows_held_out(text: str) -> bool:
    """True if a text writes an operation on a held-out pair. One-digit pairs are everybody's."""
    pairs = (map(int, pair) for pair in _OPERATION.findall(text))
    return any(max(a, b) > 9 and held_out(*pair_key(a, b)) for a, b in pairs)


def generator(
    task: str,
    item: Callable[[Random], Item],
    *,
    think: float = 0.4,
    most: int = 4,
    talk: bool = False,
) -> Generator:
    """Documents of up to ``most`` items; a share ``think`` of them has thinking, and one item.

    With ``talk`` some questions are worded as people type.
    """

    def draw_item(rng: Random, split: Split) -> Item:
        while True:
            it = item(rng)
            if split == "heldout":
                if held_out(*it.fact):
                    return it
            elif not held_out(*it.fact) and not shows_held_out("\n".join(it[:3])):
                return it

    def make(
        rng: Random,
        split: Split = "train",
        *,
        thinking: bool | None = None,
        turns: int | None = None,
    ) -> Document:
        thinking = rng.random() < think if thinking is None else thinking
        turns = turns or (1 if thinking else rng.randint(1, most))
        messages, items = system(rng, 0.1), [draw_item(rng, split) for _ in range(turns)]
        for it in items:
            ask = typed(rng, it.ask) if talk else it.ask
            messages += [user(ask), assistant(it.reply, it.why if thinking else None)]
        facts = tuple(it.fact for it in items)
        return finish(rng, task, messages, thinking, items[-1].answer, facts)

    return make

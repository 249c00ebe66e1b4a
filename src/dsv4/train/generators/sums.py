"""Sums and differences: worked steps, the one-digit facts they are made of, many without steps;
and one-digit products."""

from __future__ import annotations

from random import Random

from .document import Document, Split, assistant, draw, finish, pair_key, system, user

ADD = (
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
SUBTRACT = (
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
MULTIPLY = (
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
    """Additions and subtractions of two numbers; with thinking one, otherwise 1 to 8 in turn."""
    thinking = rng.random() < 0.65 if thinking is None else thinking
    turns = turns or (1 if thinking else rng.choice((1, 2, 4, 8)))
    messages, facts, answer = system(rng, 0.15), [], ""

    def sample() -> tuple[int, int]:
        sizes = list(digits or _digits(rng))
        rng.shuffle(sizes)
        a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in sizes)
        return a, b

    for _ in range(turns):
        a, b = draw(split, sample, lambda p: pair_key(*p))
        op = rng.choice("+-")
        question = rng.choice(ADD if op == "+" else SUBTRACT).format(a=a, b=b)
        answer = str(a + b if op == "+" else a - b)
        steps = worked_steps(a, op, b) if thinking else None
        messages += [user(question), assistant(f"{a} {op} {b} = {answer}.", steps)]
        facts.append(pair_key(a, b))
    return finish(rng, "arithmetic", messages, thinking, answer, tuple(facts))


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
    messages = [*system(rng, 0.05), user(" ".join(asked)), assistant(" ".join(known))]
    return finish(rng, "number_facts", messages, False, known[-1], ())


def times_table(rng: Random, split: Split = "train") -> Document:
    """One-digit products and the divisions that undo them: many at once, or asked in words.

    Nothing of it is held out, as of ``number_facts``.
    """
    pairs = [(rng.randint(2, 9), rng.randint(2, 9)) for _ in range(rng.randint(4, 20))]
    messages = system(rng, 0.05)
    if rng.random() < 0.6:
        facts = [f"{a}*{b}={a * b}" if rng.random() < 0.7 else f"{a * b}/{b}={a}" for a, b in pairs]
        asked = " ".join(fact.partition("=")[0] + "=?" for fact in facts)
        messages += [user(asked), assistant(". ".join(facts) + ".")]
    else:
        for a, b in pairs[:6]:
            asked = rng.choice(MULTIPLY[:8]).format(a=a, b=b)
            messages += [user(asked), assistant(f"{a} * {b} = {a * b}.")]
    return finish(rng, "times_table", messages, False, messages[-1]["content"], ())


def addition(
    rng: Random,
    split: Split = "train",
    *,
    digits: int | None = None,
    thinking: bool | None = None,
    turns: int | None = None,
) -> Document:
    """Sums of numbers of up to four digits.

    Without thinking there are many, as practice needs: in turn, or all in one question.
    """
    return _practice(rng, split, "+", digits, thinking, turns)


def subtraction(rng: Random, split: Split = "train") -> Document:
    """Differences, half of them below zero, mostly of two digits; practised as in ``addition``."""
    return _practice(rng, split, "-")


def _practice(
    rng: Random,
    split: Split,
    op: str,
    digits: int | None = None,
    thinking: bool | None = None,
    turns: int | None = None,
) -> Document:
    thinking = rng.random() < 0.3 if thinking is None else thinking
    count = turns or (1 if thinking else rng.randint(4, 20))
    usual, others = (4, (2, 3)) if op == "+" else (2, (3, 4))
    top = digits or (usual if rng.random() < 0.7 else rng.randint(*others))
    low = 10 ** (top - 1)

    def sample() -> tuple[int, int]:
        return rng.randrange(low, 10 * low), rng.randrange(low if digits else 0, 10 * low)

    def ordered() -> tuple[int, int]:
        a, b = draw(split, sample, lambda p: pair_key(*p))
        return (b, a) if op == "-" and rng.random() < 0.5 else (a, b)

    pairs = [ordered() for _ in range(count)]
    values = [a + b if op == "+" else a - b for a, b in pairs]
    replies = [f"{a} {op} {b} = {value}." for (a, b), value in zip(pairs, values, strict=True)]
    messages = system(rng, 0.05)
    if turns is None and not thinking and rng.random() < 0.5:
        asked = " ".join(f"{a} {op} {b} = ?" for a, b in pairs)
        messages += [user(asked), assistant(" ".join(replies))]
    else:
        for (a, b), reply in zip(pairs, replies, strict=True):
            steps = worked_steps(a, op, b) if thinking else None
            asked = rng.choice(ADD if op == "+" else SUBTRACT).format(a=a, b=b)
            messages += [user(asked), assistant(reply, steps)]
    name, facts = "addition" if op == "+" else "subtraction", tuple(pair_key(*p) for p in pairs)
    return finish(rng, name, messages, thinking, str(values[-1]), facts)

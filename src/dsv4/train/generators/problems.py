"""Everyday arithmetic: word problems, units, and dates."""

from __future__ import annotations

from calendar import monthrange
from datetime import date, timedelta
from random import Random

from .document import Item, generator
from .phrases import DAYS, MONTHS, NAMES
from .sums import worked_steps

# ------------------------------------------------------------------ word problems

_COUNTED = "apples books coins pens balls stones letters keys cups dolls eggs cards pears".split()
# Operations, from left to right on the numbers a, b and d; the text; the reply.
_PROBLEMS: tuple[tuple[str, str, str], ...] = (
    ("+", "{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?",
     "{n} has {c} {t}."),
    ("+", "{n} has {a} {t} and finds {b} more. How many {t} does {n} have now?",
     "{n} has {c} {t}."),
    ("+", "{n} has {a} {t} and {m} has {b} {t}. How many {t} do they have together?",
     "They have {c} {t}."),
    ("+", "{n} has {a} {t}. {m} has {b} {t} more than {n}. How many {t} does {m} have?",
     "{m} has {c} {t}."),
    ("-", "{n} has {a} {t} and gives {b} of them to {m}. How many {t} does {n} have left?",
     "{n} has {c} {t}."),
    ("-", "{n} has {a} {t} and loses {b}. How many {t} does {n} have now?", "{n} has {c} {t}."),
    ("-", "{n} has {a} {t}. {m} has {b} {t} less than {n}. How many {t} does {m} have?",
     "{m} has {c} {t}."),
    ("-", "There are {a} {t} on the table. {n} takes {b}. How many {t} are left?",
     "There are {c} {t}."),
    ("*", "There are {a} boxes with {b} {t} each. How many {t} are there?", "There are {c} {t}."),
    ("*", "{n} buys {a} bags of {b} {t}. How many {t} does {n} have?", "{n} has {c} {t}."),
    ("*", "One book costs {a} dollars. How much do {b} books cost?", "They cost {c} dollars."),
    ("/", "{n} gives {a} {t} to {b} friends, the same number to each. How many does each get?",
     "Each gets {c} {t}."),
    ("/", "{n} puts {a} {t} into {b} boxes, the same number into each. How many are in a box?",
     "There are {c} {t} in a box."),
    ("+-", "{n} has {a} {t}, finds {b} and loses {d}. How many {t} does {n} have now?",
     "{n} has {c} {t}."),
    ("-+", "{n} has {a} {t}, gives {b} to {m} and buys {d}. How many {t} does {n} have now?",
     "{n} has {c} {t}."),
    ("*+", "{n} has {a} boxes with {b} {t} each and {d} more. How many {t} does {n} have?",
     "{n} has {c} {t}."),
    ("*-", "{n} has {a} boxes with {b} {t} each and loses {d}. How many {t} are left?",
     "There are {c} {t}."),
)  # fmt: skip


def _problem(rng: Random) -> Item:
    operations, text, reply = rng.choice(_PROBLEMS)
    value = 0
    numbers: list[int] = []
    steps: list[str] = []
    for op in operations:
        if not numbers:
            value = rng.randint(2, 9) if op in "*/" else rng.randint(4, 99)
            numbers.append(value)
        if op == "+":
            other = rng.randint(2, 99)
            steps.append(worked_steps(value, "+", other))
            value += other
        elif op == "-":
            other = rng.randint(2, value - 2)
            steps.append(worked_steps(value, "-", other))
            value -= other
        else:
            other = rng.randint(2, 9)
            if op == "/":
                numbers[0] = value * other
                steps.append(f"{value * other} / {other} = {value}.")
            else:
                steps.append(f"{value} * {other} = {value * other}.")
                value *= other
        numbers.append(other)
    name, other_name = rng.sample(NAMES, 2)
    words = dict(zip("abd", numbers, strict=False)) | {
        "n": name, "m": other_name, "t": rng.choice(_COUNTED), "c": value,
    }  # fmt: skip
    fact = ("problem", text, *numbers)
    return Item(text.format(**words), " ".join(steps), reply.format(**words), str(value), fact)


word_problem = generator("word_problem", _problem, think=0.6)
"""Stories with numbers, one or two operations, every result written out when thinking."""

# ------------------------------------------------------------------ units

_UNITS: tuple[tuple[str, str, int], ...] = (  # a large unit, a small one, how many make one
    ("kilometer", "meter", 1000),
    ("meter", "centimeter", 100),
    ("centimeter", "millimeter", 10),
    ("kilogram", "gram", 1000),
    ("liter", "milliliter", 1000),
    ("week", "day", 7),
    ("day", "hour", 24),
    ("hour", "minute", 60),
    ("minute", "second", 60),
    ("year", "month", 12),
    ("foot", "inch", 12),
    ("yard", "foot", 3),
    ("dollar", "cent", 100),
)
_PLURAL = {"foot": "feet", "inch": "inches"}


def _of(count: int, unit: str) -> str:
    """``"1 meter"``, ``"3 meters"``."""
    return f"{count} {unit if count == 1 else _PLURAL.get(unit, unit + 's')}"


def _unit(rng: Random) -> Item:
    large, small, factor = rng.choice(_UNITS)
    n = rng.randint(1, 20)
    have, want, have_n, want_n = (large, small, n, n * factor)
    why = f"{_of(1, large)} is {_of(factor, small)}. {n} * {factor} = {n * factor}."
    if rng.random() < 0.5:
        have, want, have_n, want_n = small, large, n * factor, n
        why = f"{_of(1, large)} is {_of(factor, small)}. {n * factor} / {factor} = {n}."
    given, wanted = _of(have_n, have), _of(2, want)[2:]
    verb = "is" if have_n == 1 else "are"
    ask = rng.choice(
        (
            f"How many {wanted} {verb} {given}?",
            f"Convert {given} to {wanted}.",
            f"{given} {verb} how many {wanted}?",
            f"What {verb} {given} in {wanted}?",
        )
    )
    reply = f"{given[0].upper()}{given[1:]} {verb} {_of(want_n, want)}."
    return Item(ask, why, reply, str(want_n), ("units", have, want, n))


units = generator("units", _unit)
"""Lengths, weights, volumes, times and money from one unit into another, always whole."""

# ------------------------------------------------------------------ dates


def _day(d: date) -> str:
    return f"{d.day} {MONTHS[d.month - 1]} {d.year}"


def _last_day(d: date) -> int:
    return monthrange(d.year, d.month)[1]


def _weeks(days: int, start: str) -> tuple[str, str]:
    """The weekday ``days`` after ``start``, and how one finds it."""
    weeks, rest = divmod(days, 7)
    passed = [DAYS[(DAYS.index(start) + i) % 7] for i in range(rest + 1)]
    return passed[-1], f"{days} = {weeks} * 7 + {rest}. From {start}: {', '.join(passed)}."


def _weekday_after(rng: Random) -> Item:
    start, days = rng.choice(DAYS), rng.randint(1, 60)
    answer, why = _weeks(days, start)
    ask = rng.choice(
        ("What day is {n} days after {d}?", "Today is {d}. What day is it in {n} days?")
    ).format(n=days, d=start)
    return Item(ask, why, f"It is {answer}.", answer, ("weekday", start, days))


def _some_date(rng: Random) -> date:
    return date(2001, 1, 1) + timedelta(days=rng.randrange(365 * 40))


def _weekday_of(rng: Random) -> Item:
    one = _some_date(rng)
    one = one.replace(day=rng.randint(1, 20))
    other = one.replace(day=rng.randint(one.day + 1, _last_day(one)))
    days, start = other.day - one.day, DAYS[one.weekday()]
    answer, why = _weeks(days, start)
    ask = f"{_day(one)} is a {start}. What day is {_day(other)}?"
    why = f"{other.day} - {one.day} = {days}. {why}"
    return Item(ask, why, f"It is {answer}.", answer, ("date", one, other))


def _days_between(rng: Random) -> Item:
    one = _some_date(rng)
    other = one + timedelta(days=rng.randint(2, 75))
    month, days, steps = one, -one.day, []
    while (month.year, month.month) != (other.year, other.month):
        last = _last_day(month)
        before, days = days, days + last
        named = f"{MONTHS[month.month - 1]} has {last} days."
        sum_ = f"{last} - {-before}" if before < 0 else f"{before} + {last}"
        steps.append(f"{named} {sum_} = {days}.")
        month = month.replace(day=1) + timedelta(days=last)
    sum_ = f"{other.day} - {-days}" if days < 0 else f"{days} + {other.day}"
    days += other.day
    steps.append(f"{sum_} = {days}.")
    ask = rng.choice(
        (
            "How many days are there from {a} to {b}?",
            "How many days are between {a} and {b}?",
            "How many days after {a} is {b}?",
        )
    ).format(a=_day(one), b=_day(other))
    return Item(ask, " ".join(steps), f"There are {days} days.", str(days), ("date", one, other))


def _date_after(rng: Random) -> Item:
    one, days = _some_date(rng), rng.randint(2, 45)
    other = one + timedelta(days=days)
    month, day = one, one.day + days
    steps = [f"{one.day} + {days} = {day}."]
    while day > _last_day(month):
        last = _last_day(month)
        steps.append(f"{MONTHS[month.month - 1]} has {last} days. {day} - {last} = {day - last}.")
        day -= last
        month = month.replace(day=1) + timedelta(days=last)
    ask = f"What date is {days} days after {_day(one)}?"
    reply = f"It is {_day(other)}."
    return Item(ask, " ".join(steps), reply, _day(other), ("date", one, other))


_DATES = (_weekday_after, _weekday_of, _days_between, _date_after)
dates = generator("dates", lambda rng: rng.choice(_DATES)(rng), think=0.6, most=3)
"""Weekdays and days between dates, leap years included (2001 to 2040)."""

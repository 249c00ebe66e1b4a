"""The inside of words and lists: sorting, counting letters, spelling."""

from __future__ import annotations

from random import Random

from .document import Item, generator
from .needles import nonsense
from .phrases import ADJECTIVES, ANIMALS, CITIES, COLORS, FOODS, JOBS, NAMES, OBJECTS, PLACES, VERBS

# ------------------------------------------------------------------ sorting


def _sorted(rng: Random) -> Item:
    falling = False
    if rng.random() < 0.5:
        bank = rng.choice((NAMES, OBJECTS, ANIMALS, FOODS, COLORS, CITIES, PLACES, JOBS))
        given = rng.sample(bank, rng.randint(3, 6))
        ask = rng.choice(
            (
                "Sort these words: {}.",
                "Put these words in alphabetical order: {}.",
                "Sort alphabetically: {}.",
            )
        )
        first = "First"
        right = sorted(given)
    else:
        top = rng.choice((10, 100, 100, 1000))
        numbers = rng.sample(range(top), rng.randint(3, 7))
        falling = rng.random() < 0.35
        given = [str(n) for n in numbers]
        right = [str(n) for n in sorted(numbers, reverse=falling)]
        first = "Largest" if falling else "Smallest"
        ask = rng.choice(
            ("Sort these numbers from large to small: {}.", "Sort {}, the largest first.")
            if falling
            else ("Sort these numbers: {}.", "Sort {}.", "Sort from small to large: {}.")
        )
    left, steps = list(given), []
    for item in right[:-1]:
        steps.append(f"{first} of {', '.join(left)}: {item}.")
        left.remove(item)
    answer = ", ".join(right)
    ask = ask.format(", ".join(given))
    return Item(ask, " ".join(steps), f"{answer}.", answer, ("sort", falling, *sorted(given)))


sorting = generator("sorting", _sorted)
"""Three to seven words or numbers in order; thinking takes the first of what is left, each time."""

# ------------------------------------------------------------------ letters

_LONGER = (
    "strawberry raspberry blueberry mississippi balloon coffee letter pepper butter summer winter "
    "chocolate elephant computer umbrella butterfly dictionary banana pineapple committee "
    "bookkeeper address necessary tomorrow yesterday beginning hippopotamus parallel"
).split()
_WORDS = (*OBJECTS, *ANIMALS, *FOODS, *COLORS, *JOBS, *PLACES, *ADJECTIVES, *VERBS, *_LONGER)


def _letters(rng: Random) -> Item:
    word = nonsense(rng) if rng.random() < 0.15 else rng.choice(_WORDS)
    kind = rng.random()
    if kind < 0.25:
        ask = rng.choice(("Spell {}.", "Spell the word {}.", "How do you spell {}?")).format(word)
        spelled = " ".join(word)
        return Item(ask, f"{word}: {len(word)} letters.", spelled, spelled, ("spell", ask))
    if kind < 0.45:
        ask = rng.choice(("How many letters does {} have?", "How many letters are in {}?"))
        counted = " ".join(f"{c} {i + 1}" for i, c in enumerate(word))
        reply = f"The word {word} has {len(word)} letters."
        return Item(ask.format(word), counted + ".", reply, str(len(word)), ("length", word))
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghilmnoprstuvwy")
    count, steps = 0, []
    for c in word:
        count += c == letter
        steps.append(f"{c} {count}" if c == letter else c)
    ask = rng.choice(
        (
            "How many {c} are in {w}?",
            "How many {c} in {w}?",
            "How many letters {c} are in the word {w}?",
            "How many times is {c} in {w}?",
            "How many {c}'s are in {w}?",
            "Count the {c} in {w}.",
        )
    ).format(c=letter, w=word)
    why = f"{' '.join(steps)}: {count}."
    reply = f"The word {word} has {count} {letter}."
    return Item(ask, why, reply, str(count), ("letters", word, letter))


letters = generator("letters", _letters)
"""How often a letter is in a word, how many it has, and which they are; thinking spells it."""

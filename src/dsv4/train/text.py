"""Real English and real code, from packages that the user installs by name; none of it is ours.

``SOURCES`` lists them with their licences (docs/training.md says more). A source yields cleaned
documents of a few hundred words. ``corpus`` splits them by a hash into training and held-out
documents and removes what is there twice: exact copies, near copies (half of their 13-grams seen
before), and training documents that share a 13-gram with a held-out one.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from random import Random

from ..errors import TrainingError
from .generators.document import (
    Document,
    Split,
    assistant,
    finish,
    held_out,
    system,
    typed,
    user,
)

# ------------------------------------------------------------------ reading and cleaning

_QUESTION = "who what where when why how which do does did are is was can could would will".split()
_LAUGHTER = re.compile(r"\b(?:(?:ha){2,}h?|l+o+l+|lmao|omg)\b[!.]*", re.I)
_PRIVATE = re.compile(r"http|www|[@\\]|[A-Za-z_]\d\d|\d{5}|\d{3}[-. )]+\d")


def sentence(text: str) -> str:
    """The text with single spaces, a capital and an end mark."""
    text = " ".join(text.split()).strip(" ,;:-")
    return text[:1].upper() + text[1:] + ("." if text[-1:].isalnum() or text[-1:] in "'\")" else "")


def tidy(said: str) -> str:
    """A line of a chat as one would print it: a sentence, with "I", without laughter.

    Empty when nothing is left, and when it holds a link, an address, a number like that of a
    phone, a user name with digits, or anything but plain English characters.
    """
    said = " ".join(_LAUGHTER.sub(" ", said).split()).strip(" ,;:-")
    if not re.search("[A-Za-z]", said) or not said.isascii() or _PRIVATE.search(said):
        return ""
    asked = said[-1].isalnum() and said.split()[0].lower() in _QUESTION
    return sentence(re.sub(r"\bi\b", "I", said) + ("?" if asked else ""))


def read_chitchat(file: Path, turns: int = 16) -> Iterator[str]:
    """Conversations of two people about everyday things, a line a turn, up to ``turns`` lines."""
    for conversation in json.loads(file.read_text(encoding="utf-8")).values():
        said = [
            " ".join(filter(None, (tidy(message["text"]) for message in group)))
            for group in conversation["messages"]
        ]
        for start in range(0, len(said), turns):
            part = said[start : start + turns]
            if len(part) >= 4 and all(part):
                yield "\n".join(f"- {line}" for line in part)


_KINDS = {"n": 1, "v": 2, "a": 3, "r": 4, "s": 5}  # of words, as WordNet's sense keys count


def read_wordnet(folder: Path) -> Iterator[str]:
    """Meaning and examples of the words that occurred in WordNet's own text samples.

    ``dog: an animal.`` and the examples on the next line; ``dog (2)`` for the second meaning.
    """
    numbers: dict[str, int] = {}  # of the meaning, by lemma, kind, file and number in the file
    for line in (folder / "cntlist.rev").read_text(encoding="ascii").splitlines():
        key, number, _ = line.split()
        numbers[key.rsplit(":", 2)[0]] = int(number)
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="ascii").splitlines():
            if line.startswith(" "):  # the licence
                continue
            synset, _, gloss = line.partition(" | ")
            _, file, kind, count, *rest = synset.split()
            known = []
            for word, within in zip(*(iter(rest[: 2 * int(count, 16)]),) * 2, strict=True):
                word = word.split("(")[0]
                nth = numbers.get(f"{word.lower()}%{_KINDS[kind]}:{file}:{int(within, 16):02}")
                if nth:
                    known.append(word.replace("_", " ") + (f" ({nth})" if nth > 1 else ""))
            meaning, *examples = re.split(r'; "', gloss)
            if known and examples:
                shown = " ".join(sentence(e.replace('"', "")) for e in examples)
                yield f"{', '.join(known)}: {meaning.strip()}.\n{shown}"


def read_bible(program: str, verses: int = 12) -> Iterator[str]:
    """The King James Bible in passages of up to ``verses`` verses of a chapter, without numbers."""
    everything = subprocess.run(
        [program, "-f"], input="gen1:1-rev22:21\n", capture_output=True, text=True, check=True
    )
    chapter, passage = "", list[str]()
    for line in everything.stdout.splitlines():
        match = re.match(r"([1-3]?[A-Z][A-Za-z]*\d+):(\d+) (.+)", line)
        if not match:
            continue
        if passage and (match[1] != chapter or len(passage) == verses):
            yield " ".join(passage)
            passage = []
        chapter = match[1]
        passage.append(match[3])
    if passage:
        yield " ".join(passage)


def read_fortunes(folder: Path) -> Iterator[str]:
    """Sayings of the tamer files, without their authors and without drawings."""
    for name in ("food", "kids", "literature", "pets", "platitudes", "riddles", "wisdom"):
        file = folder / name
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        for saying in re.split(r"^%$", text, flags=re.M):
            body = re.split(r"^\s*--", saying, maxsplit=1, flags=re.M)[0]
            body = " ".join(body.split())
            letters = sum(c.isalpha() or c == " " for c in body)
            if len(body) > 40 and body.isascii() and letters > 0.9 * len(body):
                yield body


def read_python(folder: Path) -> Iterator[str]:
    """Documented functions of up to 40 lines of Python's own standard library."""
    for file in sorted(folder.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and node.end_lineno:
                body = lines[node.lineno - 1 : node.end_lineno]
                if len(body) <= 40:
                    yield "\n".join(line[node.col_offset :].rstrip() for line in body)


# ------------------------------------------------------------------ what there is


def _in_python(module: str, file: str) -> Path | None:
    spec = find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) / file if folders else None


@dataclass(frozen=True)
class Source:
    """A text that may be installed.

    ``install`` is the command that gets it, ``find`` says where it is (None: not there) and
    ``read`` yields its documents from there.
    """

    name: str
    what: str
    licence: str
    install: str
    find: Callable[[], Path | None]
    read: Callable[[Path], Iterable[str]]


def _there(path: str) -> Callable[[], Path | None]:
    return lambda: Path(path) if Path(path).exists() else None


def _program(name: str) -> Callable[[], Path | None]:
    return lambda: Path(found) if (found := shutil.which(name)) else None


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source("chitchat", "conversations of students, BYU PCC lab", "MIT",
               "pip install chitchat-dataset",
               lambda: _in_python("chitchat_dataset", "dataset.json"), read_chitchat),
        Source("wordnet", "meanings and examples of common words", "WordNet 3.0 (permissive)",
               "apt-get install wordnet-base", _there("/usr/share/wordnet"), read_wordnet),
        Source("bible", "the King James Bible", "text: public domain; program: GPL-2+",
               "apt-get install bible-kjv", _program("bible"),
               lambda path: read_bible(str(path))),
        Source("fortunes", "sayings", "collection: BSD; sayings: their authors'",
               "apt-get install fortunes fortunes-min", _there("/usr/share/games/fortunes"),
               read_fortunes),
        Source("python", "functions of Python's standard library", "PSF",
               "python itself", lambda: Path(sysconfig.get_paths()["stdlib"]), read_python),
    )
}  # fmt: skip


ANY_TEXT = "text"  # in shares: all sources that are installed, a document as likely as another


def present() -> list[str]:
    """Names of the sources that are installed."""
    return [name for name, source in SOURCES.items() if source.find()]


# ------------------------------------------------------------------ deduplication

GRAM = 13  # words; shorter documents are compared whole


def _grams(text: str) -> set[int]:
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - GRAM + 1)
    return {hash(" ".join(words[i : i + GRAM])) for i in range(last)}


@dataclass
class Corpus:
    """The documents of one source by split, and how many were removed as copies."""

    train: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    copies: int = 0  # the same text, or half of its 13-grams seen before
    leaks: int = 0  # training documents that share a 13-gram with a held-out one

    def of(self, split: Split) -> list[str]:
        return self.train if split == "train" else self.heldout


def deduplicate(documents: Iterable[str]) -> Corpus:
    """Splits documents by their hash and removes copies; the same for the same documents."""
    out, seen, kept = Corpus(), set[int](), list[str]()
    for text in documents:
        grams = _grams(text)
        if 2 * len(grams & seen) >= len(grams):
            out.copies += 1
        else:
            seen |= grams
            kept.append(text)
    tested = set[int]()
    for text in kept:
        if held_out("text", text):
            out.heldout.append(text)
            tested |= _grams(text)
    for text in kept:
        if not held_out("text", text):
            if _grams(text).isdisjoint(tested):
                out.train.append(text)
            else:
                out.leaks += 1
    return out


@dataclass(frozen=True)
class Passage:
    """A document of running text. ``holes`` are two positions in it, for fill-in-the-middle."""

    text: str
    task: str
    holes: tuple[int, int] | None = None


FIM_RATE = 0.1  # DeepSeek-V3, report section 4.1, from which V4 takes it


def passage(rng: Random, split: Split, name: str) -> Passage:
    """A random document of a source, or of any installed one for the name ``text``.

    One in ten is cut at two random places, to be learned as prefix, suffix, middle.
    """
    if name == ANY_TEXT:
        sizes = _sizes(split)
        name = rng.choices(list(sizes), list(sizes.values()))[0]
    text = rng.choice(corpus(name).of(split))
    holes = None
    if rng.random() < FIM_RATE:
        first, second = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        holes = first, second
    return Passage(text, name, holes)


@lru_cache(maxsize=2)
def _sizes(split: Split) -> dict[str, int]:
    """Documents of each installed source; says once which ones are missing."""
    there = present()  # never empty: Python brings one
    missing = [f"{name} ({s.install})" for name, s in SOURCES.items() if name not in there]
    if missing:
        print(f"texts that are not installed: {', '.join(missing)}", file=sys.stderr)
    return {name: len(corpus(name).of(split)) for name in there}


@lru_cache(maxsize=len(SOURCES))
def corpus(name: str) -> Corpus:
    """The documents of an installed source; made once in a process.

    Raises TrainingError for an unknown source and for one that is not installed.
    """
    source = SOURCES.get(name)
    if source is None:
        raise TrainingError("no such text", expected=", ".join(SOURCES), got=name)
    path = source.find()
    if path is None:
        raise TrainingError(f"the text {name} is not installed", hint=source.install)
    return deduplicate(source.read(path))


# ------------------------------------------------------------------ talking about words

LEXICON = "lexicon"  # in shares: conversations about the words of WordNet
_MEANING = (
    "What does {} mean?",
    "What does the word {} mean?",
    "What is the meaning of {}?",
    "Explain the word {}.",
    "Define {}.",
)
_EXAMPLE = ("Use it in a sentence.", "Give me an example.", "Can you use {} in a sentence?")


def lexicon(rng: Random, split: Split = "train") -> Document:
    """What one to three words mean first of all, with an example now and then.

    Needs the source ``wordnet``; raises TrainingError without it.
    """
    messages, facts, answer = system(rng, 0.1), [], ""
    for _ in range(rng.randint(1, 3)):
        first: list[str] = []
        while not first:
            text = rng.choice(corpus("wordnet").of(split))
            entry, _, examples = text.partition("\n")
            words, _, answer = entry.partition(": ")
            first = [word for word in words.split(", ") if "(" not in word]
        word = rng.choice(first)
        asked = typed(rng, rng.choice(_MEANING).format(word))
        messages += [user(asked), assistant(f"{word[0].upper()}{word[1:]} means: {answer}")]
        if examples and rng.random() < 0.5:
            answer = re.split(r"(?<=[.!?]) ", examples)[0]
            asked = typed(rng, rng.choice(_EXAMPLE).format(word))
            messages += [user(asked), assistant(answer)]
        facts.append(("text", text))
    return finish(rng, LEXICON, messages, False, answer, tuple(facts))

"""Texts from packages: cleaned, without copies, never in both splits, whole or with a hole."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4.cli import app
from dsv4.encoding import ASSISTANT, EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from dsv4.errors import TrainingError
from dsv4.tokenizer import Tokenizer
from dsv4.train.commands import data_app
from dsv4.train.data import as_text, batches, cut, document, render, stats
from dsv4.train.generators.document import held_out, rng_for
from dsv4.train.text import (
    FIM_RATE,
    SOURCES,
    Passage,
    Source,
    _sizes,
    corpus,
    deduplicate,
    lexicon,
    passage,
    read_bible,
    read_chitchat,
    read_fortunes,
    read_python,
    read_wordnet,
    tidy,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the old man and the sea, the boy and the boat\n"] * 9, 320, False)


def story(n: int) -> str:
    """A document of 40 words that shares nothing with the story of another number."""
    return " ".join(f"w{n}x{i}" for i in range(40))


@pytest.fixture
def stories(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One installed source, ``stories``, and one that is missing, ``lost``."""
    texts = [story(n) for n in range(60)]
    there = Source("stories", "", "", "", lambda: Path("/"), lambda _: texts)
    lost = Source("lost", "", "", "apt-get install lost", lambda: None, lambda _: [])
    for name in list(SOURCES):
        monkeypatch.delitem(SOURCES, name)
    for source in (there, lost):
        monkeypatch.setitem(SOURCES, source.name, source)
    for cache in (corpus, _sizes):
        cache.cache_clear()
    yield texts
    for cache in (corpus, _sizes):
        cache.cache_clear()


# ------------------------------------------------------------------ cleaning


@pytest.mark.parametrize(
    ("said", "printed"),
    [
        ("hello there", "Hello there."),
        ("how are  you", "How are you?"),
        ("i think i'm fine!", "I think I'm fine!"),
        ("hahaha lol yes", "Yes."),
        ("see http://a.b", ""),
        ("call 555-1234", ""),
        ("i am joe99", ""),
        ("na\u00efve", ""),
        (":)", ""),
    ],
)
def test_chat_lines_are_made_printable(said: str, printed: str) -> None:
    assert tidy(said) == printed


def test_conversations_have_a_line_a_turn(tmp_path: Path) -> None:
    def turns(*texts: str) -> dict[str, object]:
        return {"messages": [[{"text": part} for part in text.split("|")] for text in texts]}

    whole = turns("hi|how are you", "good", "nice", "yes", "bye")
    data = {"a": whole, "short": turns("hi", "hello"), "odd": turns("hi", "@x", "no", "yes")}
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps(data))
    expected = "- Hi. How are you?\n- Good.\n- Nice.\n- Yes.\n- Bye."
    assert list(read_chitchat(file)) == [expected]
    assert list(read_chitchat(file, turns=4)) == [expected.rpartition("\n")[0]]


def test_wordnet_gives_common_words_with_meaning_and_example(tmp_path: Path) -> None:
    for part in ("verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("  1 licence\n")
    (tmp_path / "cntlist.rev").write_text("dog%1:05:00:: 1 42\ndog%1:18:01:: 2 1\n")
    (tmp_path / "data.noun").write_text(
        "  1 licence\n"
        '02084071 05 n 02 dog 0 rare_dog 0 000 | an animal; "the dog barked"; "a dog"  \n'
        '10114210 18 n 01 dog 1 000 | a man; "you lucky dog"  \n'
        '02084072 05 n 01 unheard 0 000 | something; "an example"  \n'
        "02084073 05 n 01 dog 0 000 | without an example  \n"
    )
    assert list(read_wordnet(tmp_path)) == [
        "dog: an animal.\nThe dog barked. A dog.",
        "dog (2): a man.\nYou lucky dog.",
    ]


def test_bible_passages_end_with_their_chapter(tmp_path: Path) -> None:
    program = tmp_path / "bible"
    program.write_text(
        "#!/bin/sh\ncat > /dev/null\n"
        "echo Hit ?\necho Ge1:1 In the\necho Ge1:2 beginning\necho Ge1:3 God\necho Ge2:1 Thus\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    assert list(read_bible(str(program), verses=2)) == ["In the beginning", "God", "Thus"]


def test_fortunes_lose_authors_and_drawings(tmp_path: Path) -> None:
    saying = "A saying that is long enough to be worth\nkeeping for ever."
    (tmp_path / "wisdom").write_text(f"{saying}\n\t\t-- Somebody\n%\n{'/-|' * 30}\n%\nShort.\n")
    assert list(read_fortunes(tmp_path)) == [saying.replace("\n", " ")]


def test_python_functions_are_documented_and_start_at_the_margin(tmp_path: Path) -> None:
    body = 'def f(self):\n    """Says."""\n    return 1'
    text = "class A:\n" + "\n".join("    " + line for line in body.split("\n"))
    (tmp_path / "a.py").write_text(text + "\n\ndef g():\n    return 2\n")
    assert list(read_python(tmp_path)) == [body]


# ------------------------------------------------------------------ copies and splits


def test_copies_are_removed_exact_and_near() -> None:
    trained = (story(n) for n in range(99) if not held_out("text", story(n)))
    one, two, new = islice(trained, 3)
    near = one + " " + new[:30]
    half_new = " ".join(one.split()[:20] + new.split())
    got = deduplicate([one, two, one.upper(), near, half_new])
    assert got.copies == 2 and got.train + got.heldout == [one, two, half_new]


def test_training_shares_no_13_words_with_the_held_out_texts() -> None:
    tested = next(story(n) for n in range(99) if held_out("text", story(n)))
    words = tested.split()
    leak, clean = (
        next(
            t for n in range(100, 199)
            if not held_out("text", t := " ".join(words[:shared] + story(shared * n).split()))
        )
        for shared in (13, 12)
    )  # fmt: skip
    got = deduplicate([tested, leak, clean])
    assert (got.heldout, got.train, got.leaks) == ([tested], [clean], 1)


def test_the_splits_are_disjoint_and_a_tenth_is_held_out(stories: list[str]) -> None:
    made = corpus("stories")
    assert sorted(made.train + made.heldout) == sorted(stories)
    assert 0 < len(made.heldout) < 15
    assert all(held_out("text", text) for text in made.heldout)
    drawn = {passage(rng_for(i), "heldout", "stories").text for i in range(300)}
    assert drawn == set(made.heldout)


def test_a_missing_text_is_refused_or_said_with_the_command_that_installs_it(
    stories: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError, match="apt-get install lost"):
        document(0, 0, weights={"lost": 1.0})
    with pytest.raises(TrainingError, match="stories"):
        corpus("tales")
    assert {passage(rng_for(i), "train", "text").task for i in range(9)} == {"stories"}
    assert capsys.readouterr().err == "texts that are not installed: lost (apt-get install lost)\n"


def test_words_are_explained_as_wordnet_does(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [f"word{n}, other word{n}: meaning {n}.\nThe word{n} is here. Or" for n in range(60)]
    texts = [*first, *(f"word{n} (2): something else.\nThe word{n}." for n in range(60))]
    there = Source("wordnet", "", "", "", lambda: Path("/"), lambda _: texts)
    monkeypatch.setitem(SOURCES, "wordnet", there)
    corpus.cache_clear()
    examples = 0
    for split in ("train", "heldout"):
        for i in range(60):
            doc = lexicon(rng_for(i), split)
            assert all(held_out(*fact) == (split == "heldout") for fact in doc.facts)
            for m in doc.messages:
                if m["role"] == "assistant":
                    said = m["content"]
                    known = re.fullmatch(r"(?:Other w|W)ord(\d+) means: meaning (\d+)\.", said)
                    assert known[1] == known[2] if known else said.endswith(" is here.")
                    examples += known is None
    corpus.cache_clear()
    assert examples > 20


# ------------------------------------------------------------------ tokens


def test_a_text_is_trained_whole(tokenizer: Tokenizer) -> None:
    ids, weights = render(Passage("the old man", "stories"), tokenizer)
    assert tokenizer.decode(ids[1:]) == "the old man" + EOS and ids[0] == tokenizer.bos_id
    assert weights == [0.0] + [1.0] * (len(ids) - 1)


def test_one_text_in_ten_has_its_middle_at_the_end(
    tokenizer: Tokenizer, stories: list[str]
) -> None:
    drawn = [passage(rng_for(i), "train", "stories") for i in range(2000)]
    cut_up = [doc for doc in drawn if doc.holes]
    assert 0.08 < len(cut_up) / len(drawn) < 0.12 and FIM_RATE == 0.1
    for doc in cut_up[:50]:
        text = tokenizer.decode(render(doc, tokenizer)[0])
        assert text == as_text(doc)
        before, _, rest = text.partition(FIM_BEGIN)[2].partition(FIM_HOLE)
        after, _, middle = rest.partition(FIM_END)
        assert before + middle.removesuffix(EOS) + after == doc.text


def test_a_cut_text_loses_nothing() -> None:
    ids, weights = [7, *range(100, 125)], [0.0] + [1.0] * 25
    parts = cut((ids, weights), 10)
    assert [len(part) for part, _ in parts] == [10, 10, 8]
    assert all(part[0] == 7 and loss[0] == 0 for part, loss in parts)
    assert [i for part, _ in parts for i in part[1:]] == ids[1:]
    assert cut((ids, weights), 26) == [(ids, weights)]


def test_texts_are_packed_with_conversations(tokenizer: Tokenizer, stories: list[str]) -> None:
    shares = {"stories": 1.0, "arithmetic": 1.0}
    for batch in islice(batches(tokenizer, 0, 1024, 100, weights=shares), 3):
        samples = batch.ids[0].split(batch.lengths)
        running = [s for s in samples if (s == tokenizer.special_id(ASSISTANT)).sum() == 0]
        assert 0 < len(running) < len(samples)
        assert all(len(s) <= 100 and s[0] == tokenizer.bos_id for s in running[:-1])
    rows = stats(0, 60, tokenizer, shares)
    assert rows["stories"].held_out == len(corpus("stories").heldout)
    assert rows["stories"].removed == 0 and rows["arithmetic"].held_out is None
    assert rows["stories"].trained == rows["stories"].tokens - rows["stories"].documents


# ------------------------------------------------------------------ commands


def test_commands_show_what_there_is() -> None:
    shown = CliRunner().invoke(data_app, ["show", "--kind", "python", "--n", "2"])
    assert shown.exit_code == 0 and shown.output.count("--- python") == 2
    report = CliRunner().invoke(app, ["data", "stats", "--n", "40", "--kind", "dates", "--json"])
    assert json.loads(report.output)["dates"]["documents"] == 40
    listed = CliRunner().invoke(data_app, ["texts"]).output
    assert all(f"{name} " in listed for name in SOURCES)

"""The generated data: counted, right, held out where it says so, weighted where a model writes."""

from __future__ import annotations

import json
import re
from calendar import day_name
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4.encoding import ASSISTANT, EOS, PAD, encode_messages, parse_completion
from dsv4.errors import TrainingError
from dsv4.evals.tasks import evaluate_expression
from dsv4.tokenizer import Tokenizer
from dsv4.train.data import (
    HELD_OUT,
    POOL,
    Batch,
    Schedule,
    batches,
    corpus_for_tokenizer,
    document,
    documents,
    ramp,
    render,
    stats,
)
from dsv4.train.generators import TASKS
from dsv4.train.generators.dictionary import MEANINGS
from dsv4.train.generators.document import Document, held_out, pair_key, rng_for
from dsv4.train.generators.everyday import SCRIPTS, everyday
from dsv4.train.generators.knowledge import KNOWN
from dsv4.train.generators.needles import key_value, multi_needle, recall
from dsv4.train.generators.structured import json_extract
from dsv4.train.generators.sums import arithmetic, number_facts, times_table, worked_steps
from dsv4.train.generators.tools import tool_call

OPERATION = re.compile(r"(\d+) ?([-+*x]|plus|minus|times|by|to|and|from) ?(\d+)")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(corpus_for_tokenizer(0, 12000), 4096, progress=False)


def said(doc: Document) -> str:
    """Everything in a document, tool schemas and reasoning apart."""
    parts = []
    for m in doc.messages:
        parts.append(m["content"])
        parts += [c["function"]["arguments"] for c in m.get("tool_calls", [])]
    return "\n".join(parts)


def value(a: int, op: str, b: int) -> int:
    return a + b if op in "+plus" else a - b if op in "-minus" else a * b


# ------------------------------------------------------------------ counted


def test_a_document_depends_on_seed_split_and_number_only() -> None:
    stream = list(islice(documents(5), 30))
    assert [document(i, 5) for i in reversed(range(30))] == stream[::-1]
    assert stream != list(islice(documents(6), 30))
    assert stream != list(islice(documents(5, "heldout"), 30))
    # Pinned: another machine, Python or process makes the very same data.
    assert rng_for("document", 0, "train", 3).random() == 0.1612701046830871


def test_no_held_out_fact_in_12000_training_documents() -> None:
    for doc in islice(documents(1, longest=300), 12000):
        assert not any(held_out(*key) for key in doc.facts), doc
        if doc.task in ("number_facts", "times_table"):
            continue  # all of them are shown
        for a, _, b in OPERATION.findall(said(doc)):  # the text itself, whatever facts says
            one_digit = len(a) == len(b) == 1
            assert one_digit or not held_out(*pair_key(int(a), int(b))), said(doc)
        if doc.task == "recall":
            text = next(m["content"] for m in doc.messages if m["role"] == "user")
            for owner, found in re.findall(r"he [\w ]+? of ([\w ]+) is (\w+)\.", text):
                assert not held_out("fact", owner, found)


def test_held_out_documents_hold_nothing_else() -> None:
    docs = list(islice(documents(1, "heldout"), 1500))
    assert {doc.task for doc in docs} == set(HELD_OUT)
    assert all(held_out(*key) for doc in docs for key in doc.facts)
    share = sum(held_out(*pair_key(a, b)) for a in range(100) for b in range(a, 100)) / 5050
    assert 0.08 < share < 0.12


# ------------------------------------------------------------------ right


@given(st.integers(0, 999), st.sampled_from("+-"), st.integers(0, 999))
def test_written_steps_are_true_and_end_in_the_result(a: int, op: str, b: int) -> None:
    steps = worked_steps(a, op, b)
    assert steps.startswith(f"{a} {op} {b}") and steps.endswith(f"Result: {value(a, op, b)}.")
    for left, result in re.findall(r": ([-+\d]+)=(\d+)", steps):
        assert sum(map(int, re.findall(r"[-+]?\d+", left))) == int(result)
    written = re.findall(r"write (\d)", steps) or re.findall(r"=(\d),", steps)
    carry = re.findall(r"carry (\d)", steps)[-1:]
    assert int("".join(carry + written[::-1])) == abs(value(a, op, b))
    assert steps.count("=") == max(len(str(a)), len(str(b)))


def test_number_facts_are_right() -> None:
    seen = set()
    for i in range(400):
        doc = number_facts(rng_for(i))
        asked, known = (m["content"] for m in doc.messages[-2:])
        facts = re.findall(r"([-+\d]+)=(\d+)\.", known)
        assert asked == " ".join(f"{left}=?" for left, _ in facts)
        for left, result in facts:
            assert sum(map(int, re.findall(r"[-+]?\d+", left))) == int(result)
            seen.add(left)
    assert len(seen) > 500  # of 600


def test_the_times_table_is_right_and_whole() -> None:
    seen = set()
    for i in range(300):
        for m in times_table(rng_for(i)).messages:
            if m["role"] == "assistant":
                for left, result in re.findall(r"(\d+ ?[*/] ?\d+) ?= ?(\d+)\.", m["content"]):
                    assert evaluate_expression(left) == int(result)
                    seen.add(left.replace(" ", ""))
    assert len(seen) == 128  # 64 products, 64 divisions


def test_answers_are_right() -> None:
    seen = set()
    for doc in islice(documents(2, longest=400), 4000):
        last = doc.messages[-1]
        assert last["role"] == "assistant"
        assert all(part in last["content"] for part in doc.answer.split(", "))
        assert (doc.thinking_mode == "thinking") == ("reasoning_content" in last)
        for m in doc.messages:
            for a, op, b, result in re.findall(r"(\d+) ([-+*]) (\d+) = (-?\d+)\.", m["content"]):
                assert value(int(a), op, int(b)) == int(result)
                seen.add((doc.task, op))
        users = [m["content"] for m in doc.messages if m["role"] == "user"]
        if doc.task == "recall":
            for m in doc.messages:
                if m["role"] == "assistant":
                    assert users[0].count(m["content"][1:]) == 1  # "The" may be "the" there
        if doc.task == "json_extract":
            assert all(str(v) in users[0] for v in json.loads(doc.answer).values())
            assert json.dumps(json.loads(last["content"])) == doc.answer
        if doc.task == "dialogue":
            replies = " ".join(m["content"] for m in doc.messages if m["role"] == "assistant")
            assert "I am ChatGPT" not in replies and "V4-Flash" not in replies
    assert {("arithmetic", "+"), ("arithmetic", "-"), ("tool_call", "*")} <= seen


def items(task: str, n: int = 250) -> Iterator[tuple[str, str, str]]:
    """(question, thoughts, reply) of training documents of a task."""
    for i in range(n):
        said = [m for m in TASKS[task](rng_for(i), "train").messages if m["role"] != "system"]
        for ask, reply in zip(said[::2], said[1::2], strict=True):
            yield ask["content"], reply.get("reasoning_content", ""), reply["content"]


SUM = re.compile(r"(?<![\d=.])(\d+(?: ?[-+*/] ?\d+)+) ?= ?(-?\d+)")


@pytest.mark.parametrize("task", ["word_problem", "units", "dates", "addition", "subtraction"])
def test_every_written_sum_is_true(task: str) -> None:
    found = 0
    for _, why, reply in items(task):
        for left, result in SUM.findall(f"{why} {reply}"):
            assert evaluate_expression(left) == int(result)
            found += 1
    assert found > 80


@pytest.mark.parametrize("task", ["word_problem", "units"])
def test_thoughts_end_in_the_answer(task: str) -> None:
    for _, why, reply in items(task):
        if why:
            assert re.findall(r"\d+", why)[-1] == re.findall(r"\d+", reply)[-1]


def test_dates_are_those_of_the_calendar() -> None:
    def parse(text: str) -> date:
        return datetime.strptime(text, "%d %B %Y").date()

    kinds = set()
    for ask, _, reply in items("dates", 600):
        found = [parse(d) for d in re.findall(r"\d+ [A-Z][a-z]+ \d{4}", ask)]
        number = re.search(r"(\d+) days", ask)
        if ask.startswith("How many"):
            kind, right = "between", f"There are {abs((found[1] - found[0]).days)} days."
        elif ask.startswith("What date") and number:
            kind, later = "after", found[0] + timedelta(days=int(number[1]))
            right = f"It is {later.day} {later:%B %Y}."
        elif found:
            kind, right = "weekday", f"It is {found[1]:%A}."
            assert f"{found[0]:%A}" in ask
        else:
            assert number
            start = next(i for i, name in enumerate(day_name) if name in ask)
            kind, right = "week", f"It is {day_name[(start + int(number[1])) % 7]}."
        kinds.add(kind)
        assert reply == right, ask
    assert len(kinds) == 4


def test_sorted_lists_are_sorted() -> None:
    for ask, why, reply in items("sorting"):
        got = reply.rstrip(".").split(", ")
        numbers = [int(x) for x in got] if got[0].isdigit() else []
        falling = "large to small" in ask or "largest first" in ask
        assert got == sorted(got) if not numbers else numbers == sorted(numbers, reverse=falling)
        assert all(re.search(rf"\b{x}\b", ask) for x in got)
        assert not why or why.count(":") == len(got) - 1


def test_letters_are_counted_right() -> None:
    for ask, why, reply in items("letters", 500):
        if counted := re.fullmatch(r"The word (\w+) has (\d+) (\w)\.", reply):
            word, n, letter = counted.groups()
            assert word.count(letter) == int(n) and word in ask and letter in ask
            assert not why or why.endswith(f": {n}.")
        elif whole := re.fullmatch(r"The word (\w+) has (\d+) letters\.", reply):
            assert len(whole[1]) == int(whole[2]) and whole[1] in ask
        else:
            assert reply.replace(" ", "") in ask


def test_programs_print_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    programs = set()
    for ask, why, reply in items("code_output", 120):
        program = ask.split("```python\n")[1].removesuffix("\n```")
        exec(compile(program, "program", "exec"), {})
        assert capsys.readouterr().out.strip("\n") == reply
        assert not why or why.endswith(f"it prints {reply}.".replace("\n", ", "))
        programs.add(program)
    assert len(programs) > 150


def test_json_says_what_the_text_says() -> None:
    for task in ("json_nested", "json_convert"):
        for ask, _, reply in items(task):
            for value in re.findall(r"[A-Z]\w+|\d+", reply):
                assert value in ask


@pytest.mark.parametrize("length", [100, 1000])
def test_several_needles_and_keys_are_in_the_text_once(length: int) -> None:
    for i in range(40):
        doc = multi_needle(rng_for(i), length=length)
        text, reply = (m["content"] for m in doc.messages[-2:])
        said = re.findall(r"The [\w ]+ is \d+\.", reply)
        assert 2 <= len(said) <= 4 and all(text.count(s) == 1 for s in said)
        assert [re.findall(r"\d+", s)[0] for s in said] == doc.answer.split(", ")
        doc = key_value(rng_for(i), length=length)
        text = next(m["content"] for m in doc.messages if m["role"] == "user")
        for m in doc.messages:
            if m["role"] == "assistant":
                key, value = re.findall(r"of (\w+) is (\d+)\.", m["content"])[0]
                assert re.findall(rf"^{key} = (\d+)$", text, re.M) == [value]


def test_meanings_are_said_with_the_right_article() -> None:
    assert {word.split()[0] for word in MEANINGS if " " in word} == {"a", "an", "the"}
    for word, (kind, meaning) in MEANINGS.items():
        article, _, noun = word.rpartition(" ")
        assert article in ("", "the") or (article == "an") == (noun[0] in "aeiou")
        assert "_" not in kind + meaning and noun not in meaning.split()
    assert len({meaning for _, meaning in MEANINGS.values()}) == len(MEANINGS)


def test_everyday_talk_fills_every_slot_and_remembers() -> None:
    told = asked = 0
    for i in range(3000):
        doc = everyday(rng_for(i), scripts=1)
        said = [m["content"] for m in doc.messages if m["role"] != "system"]
        assert 4 <= len(said) <= 10 and not any(c in "\n".join(said) for c in "{}|[]<>=")
        for line in said[1::2]:
            assert line[0].isupper() and line[-1] in ".?!", line
        for line in said:
            assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", line), line
            assert not re.search(r"(?i)(?:[^aeiou]y|x|[cs]h|lf|mouse|sheep)s\b", line), line
        named = re.findall(r"(?:Its name is|It is called) (\w+)", " ".join(said[::2]))
        told += bool(named)
        for ask, reply in zip(said[::2], said[1::2], strict=True):
            if named and ask.startswith("What is the name of my"):
                assert reply.endswith(f" is called {named[0]}.")
                asked += 1
    assert told and asked


def test_every_line_of_the_scripts_can_be_reached() -> None:
    for _, steps in SCRIPTS:
        for before, step in zip([[], *steps], steps, strict=False):
            numbers = {str(n + 1) for n in range(len(before))}
            assert all(set(line.after) <= numbers for line in step)
            for number in numbers:
                assert any(not line.after or number in line.after for line in step)


def test_no_training_conversation_asks_a_held_out_question_of_knowledge() -> None:
    asks = {ask for asks, _ in KNOWN for ask in asks}
    shares = {"knowledge": 1.0, "dialogue": 3.0, "everyday": 1.0, "tool_call": 1.0}
    asked: set[str] = set()
    for doc in islice(documents(0, weights=shares), 6000):
        assert isinstance(doc, Document)
        asked |= {m["content"] for m in doc.messages if m["role"] == "user"} & asks
    assert len(asked) > 200 and not any(held_out("talk", ask) for ask in asked)


def test_a_question_of_knowledge_has_one_answer_wherever_it_is_asked() -> None:
    def replies(task: str) -> Iterator[tuple[str, str]]:
        for i in range(2500):
            for one, two in pairwise(TASKS[task](rng_for(i), "train").messages):
                if one["role"] == "user":
                    yield one["content"].lower().rstrip("?.!"), two["content"]

    answers: dict[str, set[str]] = {}
    for ask, reply in (*replies("knowledge"), *replies("dictionary")):
        answers.setdefault(ask, set()).add(reply)
    for ask, reply in (*replies("dialogue"), *replies("everyday")):
        if ask in answers:
            answers[ask].add(reply)
    assert len(answers) > 1000
    assert {ask: found for ask, found in answers.items() if len(found) > 1} == {}


def test_knowledge_has_two_wordings_and_one_answer() -> None:
    wordings = [ask for asks, _ in KNOWN for ask in asks]
    assert len(wordings) == len(set(wordings)) == 2 * len(KNOWN)
    assert len({reply for _, reply in KNOWN}) == len(KNOWN)
    assert all(ask.endswith("?") for ask in wordings)
    assert all(reply.endswith(".") for _, reply in KNOWN)


def test_tool_calls_name_a_declared_tool_and_get_the_right_result() -> None:
    for i in range(300):
        doc = tool_call(rng_for(i))
        schemas = {t["function"]["name"]: t["function"] for t in doc.messages[0]["tools"]}
        results = {m["tool_call_id"]: m["content"] for m in doc.messages if m["role"] == "tool"}
        for m in doc.messages:
            for call in m.get("tool_calls", []):
                function = call["function"]
                arguments = json.loads(function["arguments"])
                parameters = schemas[function["name"]]["parameters"]
                assert list(arguments) == parameters["required"] == list(parameters["properties"])
                if match := OPERATION.fullmatch(next(iter(arguments.values()))):
                    a, op, b = match.groups()
                    assert results[call["id"]] == str(value(int(a), op, int(b)))
    assert all(
        m["role"] != "tool" for i in range(50) for m in tool_call(rng_for(i), need=False).messages
    )


# ------------------------------------------------------------------ lengths and depths


def prompt_length(doc: Document, tokenizer: Tokenizer) -> int:
    end = [m["role"] for m in doc.messages].index("assistant")
    return len(tokenizer.encode(encode_messages(doc.messages[:end], doc.thinking_mode), True))


@pytest.mark.parametrize("length", [60, 500, 2000])
def test_recall_prompts_have_the_wanted_length(tokenizer: Tokenizer, length: int) -> None:
    docs = [recall(rng_for(i), length=length, keys=1) for i in range(40)]
    got = [prompt_length(doc, tokenizer) for doc in docs]
    assert all(abs(n - length) <= 0.1 * length + 4 for n in got), (min(got), max(got))


def test_needles_lie_at_every_depth() -> None:
    depths = []
    for i in range(300):
        doc = recall(rng_for(i), length=500, keys=1)
        text = next(m["content"] for m in doc.messages if m["role"] == "user")
        depths.append(text.index(doc.messages[-1]["content"][1:]) / len(text))
    tenths = [sum(int(d * 10) == k for d in depths) for k in range(10)]
    assert min(tenths) >= 10


# ------------------------------------------------------------------ weights


def trained(ids: list[int], weights: list[float], tokenizer: Tokenizer) -> list[str]:
    """Texts of the runs of weight 1."""
    runs: list[list[int]] = [[]]
    for i, w in zip(ids, weights, strict=True):
        if w == 1:
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def completion(message: dict[str, Any], thinking: bool) -> tuple[Any, ...]:
    calls = [c["function"] for c in message.get("tool_calls", [])]
    return (message["content"], message.get("reasoning_content", "") if thinking else "", calls)


def test_weights_are_on_what_the_assistant_writes(tokenizer: Tokenizer) -> None:
    for doc in islice(documents(4, longest=300), 600):
        ids, weights = render(doc, tokenizer)
        assert len(ids) == len(weights) and set(weights) == {0.0, 1.0}
        replies = [m for m in doc.messages if m["role"] == "assistant"]
        thinking = doc.thinking_mode == "thinking"
        if thinking and "tools" not in doc.messages[0]:
            replies = replies[-1:]
        runs = trained(ids, weights, tokenizer)
        assert len(runs) == len(replies)
        for run, reply in zip(runs, replies, strict=True):
            assert run.endswith(EOS) and run.count(EOS) == 1 and ASSISTANT not in run
            parsed = parse_completion(run, doc.thinking_mode, strict=True)
            calls = [
                {"name": c["function"]["name"], "arguments": c["function"]["arguments"]}
                for c in parsed.get("tool_calls") or []
            ]
            got = (parsed.get("content") or "", parsed.get("reasoning_content") or "", calls)
            assert got == completion(reply, thinking)


def test_what_is_trained_continues_the_prompt_of_inference(tokenizer: Tokenizer) -> None:
    for i in range(40):
        for doc in (
            arithmetic(rng_for(i)),
            recall(rng_for(i), length=80),
            json_extract(rng_for(i)),
        ):
            ids, weights = render(doc, tokenizer)
            effort = doc.reasoning_effort
            prompt = encode_messages(doc.messages[:-1], doc.thinking_mode, reasoning_effort=effort)
            start = tokenizer.encode(prompt, True)
            assert ids[: len(start)] == start
            assert weights[len(start) - 1] == 0 and set(weights[len(start) :]) == {1.0}


def test_other_tokens_can_be_given_a_weight(tokenizer: Tokenizer) -> None:
    _, weights = render(document(0, 0), tokenizer, prompt_weight=0.25)
    assert weights[0] == 0 and set(weights[1:]) == {0.25, 1.0}


# ------------------------------------------------------------------ batches


def split(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and weights of each sample of a batch."""
    both = (x[0].split(batch.lengths) for x in (batch.ids, batch.weights))
    return list(zip(*both, strict=True))


@pytest.mark.parametrize(("tokens", "longest"), [(1024, 1000), (4096, 300), (4096, 4096)])
def test_batches_are_whole_documents_and_little_filler(
    tokenizer: Tokenizer, tokens: int, longest: int
) -> None:
    pad, eos, wasted = tokenizer.special_id(PAD), tokenizer.eos_id, 0
    for batch in islice(batches(tokenizer, 0, tokens, longest), POOL):
        assert batch.ids.shape == batch.weights.shape == (1, tokens)
        assert batch.ids.dtype == torch.int64 and batch.weights.dtype == torch.float32
        samples = split(batch)
        if (samples[-1][0] == pad).all():
            ids, weights = samples.pop()
            assert not weights.any()
            wasted += len(ids)
        for ids, weights in samples:
            assert ids[0] == tokenizer.bos_id and (ids == tokenizer.bos_id).sum() == 1
            assert ids[-1] == eos and weights[0] == 0 and weights[-1] == 1
            assert (ids != pad).all()
    assert wasted < 0.02 * POOL * tokens


def test_every_batch_of_a_pool_has_the_same_mixture(tokenizer: Tokenizer) -> None:
    counts = [len(b.lengths) for b in islice(batches(tokenizer, 0, 4096, 1000), POOL)]
    assert max(counts) < 1.5 * min(counts)


def test_samples_are_the_documents_of_the_stream(tokenizer: Tokenizer) -> None:
    shares = {"arithmetic": 1.0, "dialogue": 1.0}
    made = {tuple(render(document(i, 0, "train", shares), tokenizer)[0]) for i in range(1000)}
    for batch in islice(batches(tokenizer, 0, 1024, 64, weights=shares), POOL):
        got = [tuple(ids.tolist()) for ids, _ in split(batch)]
        assert len(made.intersection(got)) >= len(set(got)) - 1  # and the filler


def test_batches_resume_bit_for_bit(tokenizer: Tokenizer) -> None:
    tokens, longest = ramp(1024, 2048, 30), ramp(100, 1000, 100)
    whole = list(islice(batches(tokenizer, 3, tokens, longest), POOL + 6))
    assert [b.ids.shape[1] for b in whole] == [tokens(k) for k in range(len(whole))]
    for start in (0, 1, POOL - 1, POOL, POOL + 3):
        again = batches(tokenizer, 3, tokens, longest, start_batch=start)
        for old, new in zip(whole[start : start + 3], again, strict=False):
            assert torch.equal(old.ids, new.ids) and torch.equal(old.weights, new.weights)
            assert old.lengths == new.lengths
    assert not torch.equal(next(batches(tokenizer, 4, tokens, longest)).ids, whole[0].ids)


def test_recall_texts_grow_with_the_schedule(tokenizer: Tokenizer) -> None:
    only = {"recall": 1.0}
    longest = []
    for start in (0, 16 * POOL):
        stream = batches(tokenizer, 0, 1024, ramp(128, 1000, 16 * POOL), start, weights=only)
        texts = [ids for b in islice(stream, POOL) for ids, _ in split(b) if ids[-1] == 1]
        longest.append(max(map(len, texts)))
    assert longest[0] <= 128 and 600 < longest[1] <= 1000


@pytest.mark.parametrize("tokens", [1024, lambda k: 4096 - 3072 * (k == 5)])
def test_a_length_that_fits_no_batch_is_refused(
    tokenizer: Tokenizer, tokens: int | Schedule
) -> None:
    with pytest.raises(TrainingError, match="max_length"):
        next(batches(tokenizer, 0, tokens, 2048))


def test_a_stage_can_begin_in_the_middle_of_a_pool(tokenizer: Tokenizer) -> None:
    def tokens(k: int) -> int:
        return 2048 if k < 3 else 512

    def longest(k: int) -> int:
        return 2000 if k < 3 else 256

    shares = {"recall": 1.0, "dialogue": 3.0}
    got = [b.lengths for b in islice(batches(tokenizer, 0, tokens, longest, weights=shares), 5)]
    assert [sum(lengths) for lengths in got] == [2048] * 3 + [512] * 2
    assert max(n for lengths in got for n in lengths) <= 256


def test_documents_that_never_fit_are_refused(tokenizer: Tokenizer) -> None:
    stream = batches(tokenizer, 0, 1024, 64, weights={"multi_needle": 1.0})
    with pytest.raises(TrainingError, match="in a row did not fit"):
        next(stream)


# ------------------------------------------------------------------ vocabulary and summary


def test_the_vocabulary_fits_the_data(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 4096
    summary = stats(0, 300, tokenizer)
    assert sum(row.documents for row in summary.values()) == 300
    tools = encode_messages(tool_call(rng_for(0)).messages[:2], "thinking")
    assert len(tokenizer.encode(tools, True)) < 450  # about 1,300 characters
    effort = encode_messages([{"role": "user", "content": ""}], "thinking", reasoning_effort="max")
    assert len(tokenizer.encode(effort, True)) < 110  # about 530 characters

"""Evaluations: fresh held-out instances, and checkers that take what is right and nothing else."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dsv4.cli import app
from dsv4.errors import ConfigError
from dsv4.evals.run import (
    bits_per_byte,
    draft_acceptance,
    evaluate,
    heldout_loss,
    heldout_texts,
    wilson,
)
from dsv4.evals.tasks import (
    TASKS,
    Instance,
    check_number,
    check_reply,
    evaluate_expression,
    instance,
    prompt_tokens,
    usual,
)
from dsv4.tokenizer import Tokenizer
from dsv4.train.data import corpus_for_tokenizer
from dsv4.train.generators.document import held_out, pair_key, rng_for
from dsv4.train.text import corpus


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(corpus_for_tokenizer(0, 6000), 2048, progress=False)


def say(content: str, *calls: tuple[str, str]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ]
    return message


def calculator(asked: Instance) -> tuple[str, str]:
    """Name and parameter of the declared calculator."""
    assert asked.tools
    functions = [t["function"] for t in asked.tools if not t["function"]["name"].startswith("get")]
    return functions[0]["name"], functions[0]["parameters"]["required"][0]


def is_json(text: str) -> bool:
    try:
        return json.loads(text) is not None
    except ValueError:
        return False


def right(asked: Instance) -> dict[str, Any]:
    """A reply that is right, made without the data's own wording."""
    if asked.task == "tool_call":
        name, parameter = calculator(asked)
        return say("", (name, json.dumps({parameter: f"({asked.answer})"})))
    if asked.task == "no_tool_needed":
        return say("I would say so.")
    if asked.task.startswith("json") and is_json(asked.answer):
        return say(json.dumps(json.loads(asked.answer), indent=1, sort_keys=True))
    exact = TASKS[asked.task].check is check_reply or asked.task.startswith("json")
    exact = exact or not re.search(r"\d|day", asked.answer)  # a spelled word
    return say(asked.answer if exact or asked.task == "letters" else f"It is {asked.answer}.")


def wrong(asked: Instance) -> list[dict[str, Any]]:
    """Replies that are near and wrong."""
    call = say("", ("calculator", '{"expression": "1 + 1"}'))
    out = [say(""), say("I don't know."), call, {"role": "assistant", "content": None}]
    answer = asked.answer
    if asked.task.startswith("addition"):
        out += [say(f"It is {int(answer) + d}.") for d in (-10, -1, 1, 10, 100)]
        out += [say(f"It is {answer} or 777."), say(f"It is {answer}.5."), say(f"{answer}0")]
    elif asked.task.startswith("recall"):
        out += [
            say(f"It is x{answer}."),
            say("It is " + answer[:-1]),
            say(f"{answer} or 99 or Oslo or box"),
        ]
    elif TASKS[asked.task].check is check_number and asked.task != "tool_call":
        out += [say(f"It is {int(answer) + 1}."), say(f"{answer} or 777"), say(f"{answer}.5")]
    elif asked.task.startswith("multi_needle"):
        values = answer.split(", ")
        out += [say(", ".join(values[::-1])), say(", ".join(values[1:])), say(f"{answer}, 1")]
    elif asked.task == "dates":
        out += [say(f"{answer} or Friday"), say(f"{answer} 1"), say("It is 32 May 2020.")]
    elif asked.task in ("sorting", "letters", "code_output", "dictionary", "knowledge", "everyday"):
        out += [say(answer + "0"), say(answer[1:]), say(f"{answer}\n{answer} 99")]
    elif asked.task in ("json_nested", "json_convert"):
        out += [say(answer[1:]), say(f"{answer}\n{answer}"), say(f"[{answer}]")]
    elif asked.task == "json_extract":
        person = json.loads(answer)
        out += [
            say(f"Here it is: {answer}"),
            say(answer[:-1]),
            say(f"[{answer}]"),
            say(json.dumps(person | {"age": str(person["age"])})),
            say(json.dumps(person | {"age": float(person["age"])})),
            say(json.dumps(person | {"name": person["name"] + "a"})),
            say(json.dumps(person | {"more": 1})),
            say(json.dumps({"name": person["name"]})),
        ]
    elif asked.task == "tool_call":
        name, parameter = calculator(asked)
        good = json.dumps({parameter: answer})
        out += [
            say(f"It is {answer}."),
            say("", (name + "s", good)),
            say("", ("get_time", json.dumps({"city": answer}))),
            say("", (name, json.dumps({parameter: str(int(answer) + 1)}))),
            say("", (name, json.dumps({parameter + "s": answer}))),
            say("", (name, json.dumps({parameter: answer, "more": "1"}))),
            say("", (name, json.dumps({parameter: int(answer)}))),
            say("", (name, f"[{good}]")),
            say("", (name, answer)),
            say("", (name, good[:-1])),
            say("", (name, good), (name, good)),
            say("", (name, json.dumps({parameter: "__import__('os')"}))),
        ]
    elif asked.task == "no_tool_needed":
        out = [say(""), say("  "), call, say("<｜DSML｜tool_calls>")]
        out += [say("Hello", ("calculator", "{}"))]
    return out


# ------------------------------------------------------------------ instances


@pytest.mark.parametrize("name", usual())
def test_instances_are_fresh_and_reproducible(name: str) -> None:
    first = [instance(name, 7, i) for i in range(20)]
    assert first == [instance(name, 7, i) for i in range(20)]
    assert first != [instance(name, 8, i) for i in range(20)]
    assert len({str(asked) for asked in first}) > 15
    for asked in first:
        assert asked.messages[-1]["role"] == "user"
        assert all("tools" not in m and m["content"] for m in asked.messages)
        assert bool(asked.tools) == (name in ("tool_call", "no_tool_needed"))


def test_instances_are_held_out() -> None:
    for i in range(60):
        for name in ("addition_subtraction", "tool_call"):
            question = instance(name, 0, i).messages[-1]["content"]
            a, b = map(int, re.findall(r"\d+", question))
            assert held_out(*pair_key(a, b))
            if name == "addition_subtraction":
                assert 10 <= a <= 99 and 10 <= b <= 99
        person = json.loads(instance("json_extract", 0, i).answer)
        assert held_out("person", person["name"], person["city"])
        asked = instance("no_tool_needed", 0, i)
        assert held_out("talk", asked.messages[-1]["content"])
        asked = instance("recall_500", 0, i)
        stated = re.search(rf"he ([\w ]+) is {asked.answer}\.", asked.messages[-1]["content"])
        assert stated
        owner = stated[1].partition(" of ")[2] or stated[1]
        assert held_out("fact", owner, asked.answer)


def documents_facts(name: str, i: int) -> tuple[tuple[object, ...], ...]:
    """What instance ``i`` of a task must not have in common with training."""
    task = TASKS[name]
    return task.make(rng_for("eval", name, 0, i, 0), 1000 if task.tokens else 0).facts


@pytest.mark.parametrize("name", [name for name in usual() if name != "no_tool_needed"])
def test_every_fact_of_an_instance_is_held_out(name: str) -> None:
    for i in range(10):
        facts = documents_facts(name, i)
        assert facts and all(held_out(*fact) for fact in facts)


@pytest.mark.parametrize("name", [name for name in usual() if not TASKS[name].tokens])
def test_no_answer_is_likelier_than_the_stated_chance(name: str) -> None:
    n = 400
    answers = Counter(instance(name, 9, i).answer for i in range(n))
    share = answers.most_common(1)[0][1] / n
    assert share < TASKS[name].chance + 0.04


def test_anything_in_words_passes_where_chance_is_one() -> None:
    assert [name for name, task in TASKS.items() if task.chance == 1] == ["no_tool_needed"]


def test_everyday_questions_come_with_the_talk_before_them() -> None:
    for i in range(50):
        roles = [m["role"] for m in instance("everyday", 0, i).messages if m["role"] != "system"]
        assert roles == (["user", "assistant"] * 5)[: len(roles)] and 3 <= len(roles) <= 9


def test_recall_prompts_keep_their_promise(tokenizer: Tokenizer) -> None:
    for name in ("recall_500", "recall_2000", "multi_needle_1k", "key_value_4k"):
        low, high = TASKS[name].tokens or (0, 0)
        for i in range(8):
            asked = instance(name, 3, i, tokenizer=tokenizer)
            assert low <= prompt_tokens(asked, tokenizer) <= high


def test_a_length_no_tokenizer_can_meet_is_refused() -> None:
    letters = Tokenizer.train(["a"], 300, progress=False)  # one token a byte
    task = TASKS["recall_500"]
    tasks = dict(TASKS) | {"tiny": replace(task, name="tiny", tokens=(5, 6))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4.evals.tasks.TASKS", tasks)
        with pytest.raises(ConfigError, match="length"):
            instance("tiny", 0, 0, tokenizer=letters)


# ------------------------------------------------------------------ checkers


@pytest.mark.parametrize("name", usual())
def test_checkers_accept_right_and_reject_wrong(name: str) -> None:
    check = TASKS[name].check
    for i in range(40):
        asked = instance(name, 1, i)
        assert check(asked, right(asked)), (asked, right(asked))
        for message in wrong(asked):
            assert not check(asked, message), (asked, message)


def test_checkers_accept_the_wording_of_the_training_data() -> None:
    for i in range(30):
        asked = instance("addition_subtraction", 2, i)
        assert TASKS[asked.task].check(asked, say(f"1 + 2 = {asked.answer}."))
        asked = instance("recall_500", 2, i)
        last = asked.messages[-1]["content"].splitlines()[-1]
        assert TASKS[asked.task].check(asked, say(f"{last} {asked.answer}"))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(usual())),
    st.integers(0, 5),
    st.text(max_size=40),
    st.one_of(
        st.none(),
        st.lists(
            st.fixed_dictionaries(
                {
                    "function": st.fixed_dictionaries(
                        {"name": st.text(max_size=5), "arguments": st.text(max_size=20)}
                    )
                }
            ),
            max_size=2,
        ),
    ),
)
def test_checkers_never_raise(name: str, i: int, content: str, calls: Any) -> None:
    asked = instance(name, 4, i)
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    verdict = TASKS[name].check(asked, message)
    assert isinstance(verdict, bool)
    if asked.task != "no_tool_needed" and asked.answer not in content:
        assert not verdict


@given(st.integers(-(10**6), 10**6), st.sampled_from("+-*"), st.integers(0, 10**6))
def test_expressions_are_evaluated_as_written(a: int, op: str, b: int) -> None:
    want = a + b if op == "+" else a - b if op == "-" else a * b
    assert evaluate_expression(f"{a} {op} {b}") == want
    assert evaluate_expression(f"({a}{op}{b}) * 2") == 2 * want


@pytest.mark.parametrize(
    "text", ["", "2 **9", "a", "1 +", "f(1)", "[1]", "True", "1j", "1/0", "1;2", "(" * 150, "\0"]
)
def test_anything_but_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        evaluate_expression(text)


# ------------------------------------------------------------------ running


class Scripted:
    """A model that knows the answers to some instances by heart."""

    def __init__(self, seed: int, n: int, knows: int) -> None:
        self.calls: list[Mapping[str, Any]] = []
        self.replies = {}
        for name in usual():
            for i in range(n):
                asked = instance(name, seed, i)
                reply = right(asked) if i < knows else wrong(asked)[0]
                self.replies[str((asked.messages, asked.tools, asked.thinking))] = reply

    def chat(self, messages: Any, thinking: str = "high", tools: Any = None, **kw: Any) -> Any:
        self.calls.append(kw)
        return self.replies[str((messages, tools, thinking))]


def test_evaluate_counts_what_the_model_gets_right() -> None:
    seen: list[tuple[str, int, int]] = []
    model = Scripted(11, 5, knows=3)
    report = evaluate(model, 11, 5, progress=lambda *args: seen.append(args))
    assert list(report["tasks"]) == usual() and report["seed"] == 11
    for name, row in report["tasks"].items():
        assert (row["correct"], row["n"], row["accuracy"]) == (3, 5, 0.6)
        assert row["interval"][0] < 0.6 < row["interval"][1]
        assert row["thinking"] == TASKS[name].thinking
        assert row["chance"] == TASKS[name].chance
    assert len(seen) == 5 * len(usual()) and seen[-1][1:] == (5, 3)
    assert all(kw["temperature"] == 0 and kw["max_tokens"] > 0 for kw in model.calls)
    json.dumps(report)


def test_evaluate_refuses_what_is_not_a_task() -> None:
    with pytest.raises(ConfigError, match="recall_500"):
        evaluate(Scripted(0, 1, 1), tasks=["recall_501"])
    with pytest.raises(ConfigError, match="n of at least 1"):
        evaluate(Scripted(0, 1, 1), n=0)


def test_wilson_interval() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(90, 100)
    assert math.isclose(low, 0.8256, abs_tol=1e-4) and math.isclose(high, 0.9448, abs_tol=1e-4)
    assert wilson(100, 100)[1] == 1.0 and wilson(0, 100)[0] == 0.0


def test_heldout_loss_of_a_uniform_model_is_the_log_of_its_vocabulary(
    tokenizer: Tokenizer,
) -> None:
    class Uniform:
        def logits(self, ids: Any) -> torch.Tensor:
            return torch.zeros(len(ids), tokenizer.vocab_size)

    loss = heldout_loss(Uniform(), tokenizer, seed=0, n=60, longest=200)
    assert {"all", "arithmetic", "recall"} <= set(loss)
    assert all(math.isclose(v, math.log(2048), rel_tol=1e-5) for v in loss.values())


def test_bits_per_byte_count_bytes_and_not_tokens(tokenizer: Tokenizer) -> None:
    class Uniform:
        def logits(self, ids: Any) -> torch.Tensor:
            return torch.zeros(len(ids), tokenizer.vocab_size)

    texts = heldout_texts("python", seed=3, n=5)
    assert set(texts) <= set(corpus("python").heldout) and len(set(texts)) == 5
    assert texts != heldout_texts("python", seed=4, n=5)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    expected = math.log2(tokenizer.vocab_size) * tokens / sum(len(t.encode()) for t in texts)
    got = bits_per_byte(Uniform(), tokenizer, "python", seed=3, n=5, longest=10_000)
    assert math.isclose(got["bits"], expected, rel_tol=1e-5)
    assert math.isclose(got["chance"], expected, rel_tol=1e-5)
    assert got["bytes"] == sum(len(t.encode()) for t in texts)


class Drafting:
    """Says ``reply`` (the end token is not among it) and drafts it, but for token ``wrong``."""

    def __init__(self, tokenizer: Tokenizer, reply: str, wrong: int) -> None:
        self.reply, self.wrong = tokenizer.encode(reply), wrong
        self.vocabulary, self.prompts = tokenizer.vocab_size, 0

    def generate(self, prompt_ids: Any, params: Any = None) -> list[int]:
        assert params.temperature == 0
        self.start, self.prompts = len(prompt_ids), self.prompts + 1
        return self.reply[: params.max_tokens]

    def mtp_logits(self, ids: Any) -> torch.Tensor:
        drafts = [*ids[2:], 0]  # of the rows 0 to T - 2
        drafts[self.start + self.wrong - 2] = 5
        return torch.nn.functional.one_hot(torch.tensor(drafts), self.vocabulary).float()


def test_drafts_are_compared_with_what_the_model_says(tokenizer: Tokenizer) -> None:
    model = Drafting(tokenizer, "I am fine, thank you.", wrong=1)
    said = len(model.reply)  # the end token comes on top, the first one is no draft
    row = draft_acceptance(model, tokenizer, seed=0, n=3)
    assert model.prompts == 3 and row["drafts"] == 3 * said
    assert row["accepted"] == 3 * (said - 1)
    assert row["interval"][0] < row["acceptance"] == (said - 1) / said < row["interval"][1]
    assert row["chance"] >= 1 / said
    cut = draft_acceptance(Drafting(tokenizer, "Yes, and so on.", 2), tokenizer, n=1, longest=3)
    assert (cut["accepted"], cut["drafts"]) == (1, 2)  # no end of the reply in sight


def test_the_command_prints_a_table_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scripted(1, 2, knows=1)
    api = SimpleNamespace(load=lambda name, numerics: model)
    monkeypatch.setitem(sys.modules, "dsv4.api", api)
    arguments = ["eval", "v4-nano", "--n", "2", "--seed", "1", "--task", "tool_call"]
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0 and "50.0%" in table.output and "9.5% to 90.5%" in table.output
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert report["model"] == "v4-nano" and report["tasks"]["tool_call"]["correct"] == 1

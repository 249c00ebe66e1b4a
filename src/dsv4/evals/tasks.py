"""The tasks: held-out instances, and the checkers that say whether a reply is right.

An instance is made from ``(task, seed, number)`` alone. Its operands, facts, person or question
are held out (``held_out`` of train/generators/document.py), so no training document shows them. A
checker is a pure function of the instance and the reply; it needs no model and trusts nothing.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from ..encoding import encode_segments
from ..errors import ConfigError
from ..tokenizer import Tokenizer
from ..train.generators.code import code_output
from ..train.generators.dictionary import dictionary
from ..train.generators.document import Document, Generator, Message, rng_for
from ..train.generators.everyday import everyday
from ..train.generators.knowledge import knowledge
from ..train.generators.needles import key_value, multi_needle, recall
from ..train.generators.phrases import ANIMALS, CITIES, COLORS, DAYS, FOODS, MONTHS, OBJECTS
from ..train.generators.problems import dates, units, word_problem
from ..train.generators.structured import json_convert, json_extract, json_nested
from ..train.generators.sums import addition, arithmetic
from ..train.generators.tools import GET_TIME, GET_WEATHER, tool_call
from ..train.generators.words import letters, sorting


@dataclass(frozen=True)
class Instance:
    """One question. ``tools`` go to the model beside ``messages``; ``answer`` is for the checker.

    ``answer`` is the number, the value or the JSON text that is right. ``thinking`` is the
    effort the task is asked with: "off", "high" or "max".
    """

    task: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    thinking: str
    answer: str


Checker = Callable[[Instance, Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Task:
    """How instances are made and replies are judged.

    ``make`` gives a held-out document from a generator and a length in tokens, which only tasks
    with ``tokens`` (the least and the most of their prompts) look at. ``max_tokens`` bounds the
    reply, reasoning included. ``chance`` is what a model reaches that knows the form of the answer
    and nothing else, by always giving the likeliest one. A task not ``usual`` is run when named.
    The question is the first turn of the document, or its ``last`` one with all before it.
    """

    name: str
    make: Callable[[Random, int], Document]
    check: Checker
    thinking: str
    max_tokens: int
    chance: float = 0.0
    tokens: tuple[int, int] | None = None
    usual: bool = True
    last: bool = False


# ------------------------------------------------------------------ checkers


def _content(message: Mapping[str, Any]) -> str:
    return str(message.get("content") or "")


def check_number(instance: Instance, message: Mapping[str, Any]) -> bool:
    """The last number of the reply is the answer, and no tool was called."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", _content(message).replace("−", "-"))
    return not message.get("tool_calls") and numbers[-1:] == [instance.answer]


_VALUES = frozenset((*COLORS, *ANIMALS, *FOODS, *CITIES, *OBJECTS))


def check_value(instance: Instance, message: Mapping[str, Any]) -> bool:
    """The reply names the value and no other number or value word, the question's own apart."""
    asked = instance.messages[-1]["content"].splitlines()[-1]

    def values(text: str) -> set[str]:
        return {w for w in re.findall(r"\w+", text) if w.isdigit() or w in _VALUES}

    said = values(_content(message)) - values(asked)
    return not message.get("tool_calls") and said == {instance.answer}


def check_values(instance: Instance, message: Mapping[str, Any]) -> bool:
    """The reply's numbers are those of the answer, in its order, and no tool was called."""
    said = re.findall(r"\d+", _content(message))
    return not message.get("tool_calls") and ", ".join(said) == instance.answer


def check_reply(instance: Instance, message: Mapping[str, Any]) -> bool:
    """The reply is the answer and nothing else, a period at its end apart."""
    said = _content(message).strip().removesuffix(".")
    return not message.get("tool_calls") and said == instance.answer.removesuffix(".")


def check_letters(instance: Instance, message: Mapping[str, Any]) -> bool:
    """The number, or the spelled word."""
    check = check_number if instance.answer.isdigit() else check_reply
    return check(instance, message)


_DATE = re.compile(rf"\d+ (?:{'|'.join(MONTHS)}) \d+|{'|'.join(DAYS)}|-?\d+")


def check_date(instance: Instance, message: Mapping[str, Any]) -> bool:
    """The reply names one weekday, date or number, and it is the answer."""
    said = _DATE.findall(_content(message))
    return not message.get("tool_calls") and said == [instance.answer]


def check_json(instance: Instance, message: Mapping[str, Any]) -> bool:
    """The reply is the JSON value and nothing else: same keys, items, values and types."""
    try:
        got = json.loads(_content(message))
    except (ValueError, RecursionError):
        return False
    want = json.loads(instance.answer)
    return json.dumps(got, sort_keys=True) == json.dumps(want, sort_keys=True)


def check_converted(instance: Instance, message: Mapping[str, Any]) -> bool:
    """The JSON value, if the answer is JSON, or else its very lines."""
    try:
        json.loads(instance.answer)
    except ValueError:
        return check_reply(instance, message)
    return check_json(instance, message)


def check_tool_call(instance: Instance, message: Mapping[str, Any]) -> bool:
    """One call of the declared calculator, whose expression has the right value."""
    others = (GET_TIME, GET_WEATHER)
    calculator = next(t["function"] for t in instance.tools or [] if t not in others)
    calls = message.get("tool_calls") or []
    try:
        function = calls[0]["function"]
        arguments = json.loads(function["arguments"])
        return (
            len(calls) == 1
            and function["name"] == calculator["name"]
            and list(arguments) == calculator["parameters"]["required"]
            and evaluate_expression(*arguments.values()) == int(instance.answer)
        )
    except (AttributeError, LookupError, TypeError, ValueError):
        return False


def check_no_call(instance: Instance, message: Mapping[str, Any]) -> bool:
    """An answer in words: no call, no attempt at one in the text. Says nothing of its truth."""
    content = _content(message).strip()
    return not message.get("tool_calls") and bool(content) and "DSML" not in content


_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate_expression(text: str) -> float:
    """Value of ``+ - * /``, parentheses and numbers; ValueError for anything else."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value  # type: ignore[return-value]  # the type was just checked
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            result: float = _OPERATORS[type(node.op)](value(node.left), value(node.right))
            return result
        raise ValueError("not arithmetic")

    if not isinstance(text, str) or not re.fullmatch(r"[0-9+\-*/(). ]{1,200}", text):
        raise ValueError("not an expression")
    try:
        return value(ast.parse(text.strip(), mode="eval"))
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError("not arithmetic") from error


# ------------------------------------------------------------------ the table


def _two_digits(rng: Random, _: int) -> Document:
    return arithmetic(rng, "heldout", digits=(2, 2), turns=1, thinking=False)


def _two_digit_sums(rng: Random, _: int) -> Document:
    return addition(rng, "heldout", digits=2, turns=1, thinking=False)


def _four_digits(rng: Random, _: int) -> Document:
    return addition(rng, "heldout", digits=4, turns=1, thinking=False)


def _one_key(rng: Random, length: int) -> Document:
    return recall(rng, "heldout", length=length, keys=1, thinking=False)


def _several_keys(rng: Random, length: int) -> Document:
    return multi_needle(rng, "heldout", length=length, thinking=False)


def _one_line(rng: Random, length: int) -> Document:
    return key_value(rng, "heldout", length=length, turns=1, thinking=False)


def _person(rng: Random, _: int) -> Document:
    fields = ("name", "age", "city")
    return json_extract(rng, "heldout", fields=fields, thinking=False)


def _calculation(rng: Random, _: int) -> Document:
    return tool_call(rng, "heldout", need=True, turns=1, thinking=False)


def _no_calculation(rng: Random, _: int) -> Document:
    return tool_call(rng, "heldout", need=False, turns=1, thinking=False)


def _talk(rng: Random, _: int) -> Document:
    return everyday(rng, "heldout", thinking=False, scripts=1, sure=True)


def _one(generate: Generator) -> Callable[[Random, int], Document]:
    return lambda rng, _: generate(rng, "heldout", turns=1, thinking=False)


def _long(name: str, make: Callable[[Random, int], Document], check: Checker, most: int) -> Task:
    """A task with a prompt of about ``most`` tokens; the longest are run when named."""
    low = most - most // 10
    chance = 0.0 if make is _several_keys else 0.02
    return Task(name, make, check, "off", 160, chance, (low, most), most < 3000)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("addition_subtraction", _two_digits, check_number, "high", 160, 0.01),
        Task("addition_subtraction_no_thinking", _two_digits, check_number, "off", 32, 0.01),
        Task("addition_2_digits_no_thinking", _two_digit_sums, check_number, "off", 32, 0.01),
        Task("addition_4_digits", _four_digits, check_number, "high", 200),
        Task("addition_4_digits_no_thinking", _four_digits, check_number, "off", 32),
        Task("word_problem", _one(word_problem), check_number, "high", 240, 0.03),
        Task("units", _one(units), check_number, "off", 40, 0.09),
        Task("dates", _one(dates), check_date, "high", 160, 0.1),
        Task("sorting", _one(sorting), check_reply, "off", 60, 0.05),
        Task("letters", _one(letters), check_letters, "high", 120, 0.37),
        Task("recall_500", _one_key, check_value, "off", 40, 0.02, (450, 550)),
        Task("recall_2000", _one_key, check_value, "off", 40, 0.02, (1900, 2040)),
        _long("recall_1k", _one_key, check_value, 1000),
        _long("recall_4k", _one_key, check_value, 4000),
        _long("recall_16k", _one_key, check_value, 16000),
        _long("recall_32k", _one_key, check_value, 32000),
        _long("multi_needle_1k", _several_keys, check_values, 1000),
        _long("multi_needle_4k", _several_keys, check_values, 4000),
        _long("multi_needle_16k", _several_keys, check_values, 16000),
        _long("key_value_1k", _one_line, check_number, 1000),
        _long("key_value_4k", _one_line, check_number, 4000),
        _long("key_value_16k", _one_line, check_number, 16000),
        Task("json_extract", _person, check_json, "off", 64),
        Task("json_nested", _one(json_nested), check_json, "off", 80),
        Task("json_convert", _one(json_convert), check_converted, "off", 120, 0.01),
        Task("tool_call", _calculation, check_tool_call, "off", 120),
        Task("no_tool_needed", _no_calculation, check_no_call, "off", 64, 1.0),
        Task("code_output", _one(code_output), check_reply, "off", 60, 0.08),
        Task("everyday", _talk, check_reply, "off", 80, 0.05, last=True),
        Task("knowledge", _one(knowledge), check_reply, "off", 60, 0.01),
        Task("dictionary", _one(dictionary), check_reply, "off", 60, 0.13),
    )
}


def usual() -> list[str]:
    """The names of the tasks that run when none is named."""
    return [task.name for task in TASKS.values() if task.usual]


def find_task(name: str) -> Task:
    """The task of that name; ConfigError lists the names when there is none."""
    if name not in TASKS:
        raise ConfigError("no such task", expected=", ".join(TASKS), got=name)
    return TASKS[name]


def prompt_tokens(instance: Instance, tokenizer: Tokenizer) -> int:
    """Tokens of the prompt the model reads, tools not counted."""
    mode = "chat" if instance.thinking == "off" else "thinking"
    return len(tokenizer.encode_segments(encode_segments(instance.messages, mode)))


def instance(
    name: str,
    seed: int,
    number: int,
    thinking: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Instance:
    """Instance ``number`` of a task: the same for the same arguments.

    ``thinking`` replaces the task's own effort. A task that promises a prompt length keeps it
    exactly with ``tokenizer``, otherwise as counted in words and digits. Raises ConfigError for
    an unknown task, and for a tokenizer that cannot meet the length.
    """
    task = find_task(name)
    low, high = task.tokens or (0, 0)
    length = wanted = (low + high) // 2
    for attempt in range(20):
        doc = task.make(rng_for("eval", name, seed, number, attempt), length)
        out = _question(doc, task, thinking or task.thinking)
        if not task.tokens or not tokenizer:
            return out
        got = prompt_tokens(out, tokenizer)
        if low <= got <= high:
            return out
        length = max(1, round(length * wanted / got))
    raise ConfigError("no prompt of the wanted length", expected=f"{low} to {high}", got=got)


def _question(doc: Document, task: Task, thinking: str) -> Instance:
    """The document up to the assistant's first or last message, its tools apart."""
    roles = [message["role"] for message in doc.messages]
    end = len(roles) - 1 if task.last else roles.index("assistant")
    messages = [dict(message) for message in doc.messages[:end]]
    tools = messages[0].pop("tools", None)
    if messages[0]["role"] == "system" and not messages[0]["content"]:
        messages = messages[1:]
    return Instance(task.name, messages, tools, thinking, doc.answer)

"""Tool calls: a declared calculator, and a second tool now and then."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from .document import (
    Document,
    Exchange,
    Message,
    Split,
    assistant,
    draw,
    finish,
    pair_key,
    user,
)
from .phrases import CITIES, SYSTEM
from .sums import ADD, MULTIPLY, SUBTRACT
from .talk import PLAIN


def _tool(name: str, description: str, parameter: str, what: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {parameter: {"type": "string", "description": what}},
        "required": [parameter],
    }
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


CALCULATOR = _tool(
    "calculator", "Evaluate an arithmetic expression", "expression", "The expression"
)
GET_TIME = _tool("get_time", "Get the time in a city", "city", "The city name")
GET_WEATHER = _tool("get_weather", "Get the weather in a city", "city", "The city name")
_SKIES = ("sunny", "cloudy", "rainy", "windy", "snowy")


def _calculator(rng: Random) -> dict[str, Any]:
    """The calculator, described in other words, now and then under another name."""
    if rng.random() < 0.4:
        return CALCULATOR
    return _tool(
        rng.choice(("calculator",) * 5 + ("calculate", "calc", "math")),
        rng.choice(
            (
                "Evaluate an arithmetic expression",
                "Evaluates a mathematical expression.",
                "A calculator for arithmetic.",
                "Calculate the value of an expression",
                "Compute the result of a math expression and return it",
            )
        ),
        rng.choice(("expression",) * 5 + ("expr", "input")),
        rng.choice(("The expression", "The expression to evaluate", "for example 12 * 34")),
    )


def _problem(rng: Random, split: Split) -> tuple[str, str, str, tuple[object, ...]]:
    """(question, expression, result, key) of a product, or a sum or difference of any size."""
    op = rng.choice("***++-")

    def sample() -> tuple[int, int]:
        sizes = (2, 3, 3) if op == "*" else (2, 3, 4, 4, 5)
        n, m = rng.choice(sizes), rng.choice(sizes)
        return rng.randrange(10 ** (n - 1), 10**n), rng.randrange(10 ** (m - 1), 10**m)

    a, b = draw(split, sample, lambda p: pair_key(*p))
    bank = {"*": MULTIPLY, "+": ADD, "-": SUBTRACT}[op]
    result = {"*": a * b, "+": a + b, "-": a - b}[op]
    return rng.choice(bank).format(a=a, b=b), f"{a} {op} {b}", str(result), pair_key(a, b)


def tool_call(
    rng: Random,
    split: Split = "train",
    *,
    need: bool | None = None,
    turns: int | None = None,
    thinking: bool | None = None,
) -> Document:
    """1 to 3 questions with a calculator declared; ``need`` makes all of them (not) need it.

    Every calculation goes to the calculator. Some documents declare a second tool.
    """
    thinking = rng.random() < 0.5 if thinking is None else thinking
    turns = turns or rng.randint(1, 3)
    calculator = _calculator(rng)
    other = rng.choice((GET_TIME, GET_WEATHER)) if rng.random() < 0.4 else None
    tools = [tool for tool in (calculator, other) if tool]
    rng.shuffle(tools)
    content = "" if rng.random() < 0.5 else rng.choice(SYSTEM)
    messages: list[Message] = [{"role": "system", "content": content, "tools": tools}]
    facts: list[tuple[object, ...]] = []
    answer = ""

    def call(name: str, arguments: dict[str, str], result: str, why: str, reply: str) -> None:
        identity = f"call_{len(messages)}"
        function = {"name": name, "arguments": json.dumps(arguments)}
        message = assistant("", why if thinking else None)
        message["tool_calls"] = [{"id": identity, "type": "function", "function": function}]
        messages.append(message)
        messages.append({"role": "tool", "tool_call_id": identity, "content": result})
        messages.append(assistant(reply, f"The result is {result}." if thinking else None))

    def plain() -> Exchange:
        return rng.choice(PLAIN)(rng)[0]

    for _ in range(turns):
        needed = rng.random() < 0.65 if need is None else need
        asks: tuple[str, ...]
        if needed and other and need is None and rng.random() < 0.35:
            name, city = other["function"]["name"], rng.choice(CITIES)
            if other is GET_TIME:
                answer = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
                asks = ("What time is it in {}?", "Tell me the time in {}.", "The time in {}?")
                reply = f"It is {answer} in {city}."
            else:
                answer = rng.choice(_SKIES)
                asks = ("What is the weather in {}?", "How is the weather in {}?")
                reply = f"The weather in {city} is {answer}."
            messages.append(user(rng.choice(asks).format(city)))
            call(name, {"city": city}, answer, f"I need {name} for {city}.", reply)
        elif needed:
            question, expression, answer, key = _problem(rng, split)
            messages.append(user(question))
            function = calculator["function"]
            parameter = function["parameters"]["required"][0]
            why = f"I need the {function['name']} for {expression}."
            reply = f"{expression} = {answer}."
            call(function["name"], {parameter: expression}, answer, why, reply)
            facts.append(key)
        else:
            question, _, answer = draw(split, plain, lambda e: ("talk", e[0]))
            why = "I do not need a tool." if thinking else ""
            messages += [user(question), assistant(answer, why or None)]
    return finish(rng, "tool_call", messages, thinking, answer, tuple(facts))

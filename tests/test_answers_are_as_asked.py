"""What a request demands of an answer holds: choices, formats, grammars, budgets, gaps."""

from __future__ import annotations

import ipaddress
import json
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from live_server import CALL, HELLO, OFF, WEATHER, Server
from scripted_models import ScriptedModel, one_torch_thread  # noqa: F401

from dsv4.completion import parse_completion
from dsv4.encoding import DSML, FIM_BEGIN, FIM_END, FIM_HOLE
from dsv4.server import LocalBackend
from dsv4.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "color": {"enum": ["red", "green"]},
    },
    "required": ["name", "age", "color"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}


@pytest.fixture(scope="module")
def scripted_server(tokenizer: Tokenizer) -> Iterator[tuple[Server, ScriptedModel]]:
    model = ScriptedModel(tokenizer)
    with Server(LocalBackend(model)) as server:
        yield server, model


@pytest.fixture
def scripted(scripted_server: tuple[Server, ScriptedModel]) -> Callable[..., Server]:
    server, model = scripted_server

    def say(script: str | Callable[[str], str]) -> Server:
        model.script = script
        return server

    return say


def choice(server: Server, **body: Any) -> dict[str, Any]:
    response = server.post({"messages": HELLO, **body})
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


# ---------------------------------------------------------------------- several choices


def test_n_answers_differ_and_are_those_of_the_seeds(tiny: Server) -> None:
    body = {"messages": HELLO, "n": 3, "seed": 5, "max_tokens": 4, **OFF}
    answer = tiny.post(body).json()
    texts = [c["message"]["content"] for c in answer["choices"]]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2] and len(set(texts)) == 3
    alone = tiny.post({**body, "n": 1, "seed": 6}).json()
    assert alone["choices"][0]["message"]["content"] == texts[1]
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    chunks = tiny.chunks(body)
    for i in range(3):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert own[0]["delta"]["role"] == "assistant" and own[-1]["finish_reason"] == "length"
        assert "".join(c["delta"].get("content") or "" for c in own) == texts[i]
    assert ["usage" in c for c in chunks] == [False] * (len(chunks) - 1) + [True]


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize("seed", range(3))
def test_a_json_schema_holds_whatever_the_model_says(
    scripted: Callable[..., Server], seed: int
) -> None:
    """What the script says cannot come, so every token is one of those the grammar leaves."""
    said = choice(scripted("Never."), response_format=FORMAT, seed=seed, max_tokens=900, **OFF)
    assert said["finish_reason"] == "stop"
    person = json.loads(said["message"]["content"])
    assert set(person) == set(PERSON["properties"])  # type: ignore[call-overload]
    assert 0 <= person["age"] <= 150 and len(person["name"]) <= 8
    assert person["color"] in ("red", "green")


def test_json_mode_gives_an_object_even_to_a_model_that_talks(
    scripted: Callable[..., Server],
) -> None:
    server = scripted('Thinking {"not": json}</think>{"a": 1}')
    said = choice(server, response_format={"type": "json_object"})
    assert said["message"]["reasoning_content"] == 'Thinking {"not": json}'
    assert json.loads(said["message"]["content"]) == {"a": 1}
    said = choice(
        scripted("I would rather talk."), response_format={"type": "json_object"}, seed=1,
        max_tokens=200, **OFF,
    )  # fmt: skip
    assert said["message"]["content"].startswith("{") or said["finish_reason"] == "length"


def test_a_schema_leaves_room_for_calls(scripted: Callable[..., Server]) -> None:
    said = choice(scripted(CALL), response_format=FORMAT, tools=[WEATHER], **OFF)
    assert said["finish_reason"] == "tool_calls"


# ---------------------------------------------------------------------- strict tools

STRICT = {
    "type": "function",
    "function": {
        "name": "book",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "class": {"type": "string", "enum": ["first", "second"]},
                "seats": {"type": "integer", "minimum": 1, "maximum": 9},
                "when": {"$ref": "#/$defs/day"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "required": ["city", "class", "seats", "when", "note"],
            "additionalProperties": False,
            "$defs": {"day": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"}},
        },
    },
}


@pytest.mark.parametrize("seed", range(3))
def test_a_strict_call_fits_its_schema_whatever_the_model_says(
    scripted: Callable[..., Server], seed: int
) -> None:
    """The model opens a call and then says anything at all."""
    server = scripted(f"Well.\n\n<{DSML}Paris ")
    said = choice(server, tools=[STRICT], seed=seed, max_tokens=900, **OFF)
    if said["finish_reason"] == "length":  # an endless city
        assert "tool_calls" not in said["message"]
        return
    (call,) = said["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert set(arguments) == {"city", "class", "seats", "when", "note"}
    assert arguments["class"] in ("first", "second") and 1 <= arguments["seats"] <= 9
    assert len(arguments["when"]) == 7 and isinstance(arguments["city"], str)
    assert said["message"]["content"] == "Well."


def test_a_strict_call_as_the_model_would_write_it_is_left_alone(
    scripted: Callable[..., Server],
) -> None:
    def parameter(name: str, kind: str, value: str) -> str:
        return f'<{DSML}parameter name="{name}" string="{kind}">{value}</{DSML}parameter>\n'

    block = (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="book">\n'
        + parameter("city", "true", 'Sao "Paulo" </b> <x> 3 < 4')
        + parameter("class", "true", "first")
        + parameter("seats", "false", "2")
        + parameter("when", "false", '"2026-11"')
        + parameter("note", "false", "null")
        + f"</{DSML}invoke>\n</{DSML}tool_calls>"
    )
    said = choice(scripted("Fine." + block), tools=[STRICT], **OFF)
    assert json.loads(said["message"]["tool_calls"][0]["function"]["arguments"]) == {
        "city": 'Sao "Paulo" </b> <x> 3 < 4',
        "class": "first",
        "seats": 2,
        "when": "2026-11",
        "note": None,
    }
    assert parse_completion(block, "chat", tools=[STRICT])["tool_calls"]


LINK = {
    "type": "object",
    "properties": {
        "v": {"type": "integer", "maximum": 9, "minimum": 0},
        "next": {"anyOf": [{"$ref": "#/$def/link"}, {"type": "null"}]},
    },
    "required": ["v", "next"],
    "additionalProperties": False,
}
PROMISED: dict[str, tuple[dict[str, Any], Callable[[Any], object]]] = {
    "pattern": ({"type": "string", "pattern": "^[a-c]{2}$"}, lambda v: re.fullmatch("[a-c]{2}", v)),
    "email": ({"type": "string", "format": "email"}, lambda v: re.fullmatch(r"\S+@\S+", v)),
    "hostname": ({"type": "string", "format": "hostname"}, lambda v: re.fullmatch(r"[\w.-]+", v)),
    "ipv4": ({"type": "string", "format": "ipv4"}, ipaddress.IPv4Address),
    "ipv6": ({"type": "string", "format": "ipv6"}, ipaddress.IPv6Address),
    "uuid": ({"type": "string", "format": "uuid"}, uuid.UUID),
    "const": ({"type": "integer", "const": 17}, lambda v: v == 17),
    "default": ({"type": "boolean", "default": True}, lambda v: isinstance(v, bool)),
    "range": ({"type": "integer", "minimum": 3, "maximum": 5}, lambda v: 3 <= v <= 5),
    "exclusive": ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
                  lambda v: v == 4),
    "multipleOf": ({"type": "integer", "multipleOf": 50, "minimum": 0, "maximum": 500},
                   lambda v: v % 50 == 0),
    "array": ({"type": "array", "items": {"enum": ["x", "y"]}}, lambda v: set(v) <= {"x", "y"}),
    "enum": ({"enum": [1, "two", None]}, lambda v: v in (1, "two", None)),
    "anyOf": ({"anyOf": [{"type": "null"}, {"type": "boolean"}]},
              lambda v: v is None or isinstance(v, bool)),
    "$def": ({"$ref": "#/$def/link"}, lambda v: v.keys() == {"v", "next"} and 0 <= v["v"] <= 9),
}  # fmt: skip


@pytest.mark.parametrize("keyword", PROMISED)
def test_what_the_hosted_service_promises_of_strict_tools_holds(
    scripted: Callable[..., Server], keyword: str
) -> None:
    """Every keyword that it documents, its own spelling ``$def`` and recursion among them."""
    value, fits = PROMISED[keyword]
    parameters = {
        "type": "object", "properties": {"it": value}, "required": ["it"],
        "additionalProperties": False, "$def": {"link": LINK},
    }  # fmt: skip
    tool = {"type": "function", "function": {
        "name": "f", "strict": True, "parameters": parameters,
    }}  # fmt: skip
    server = scripted(f"\n\n<{DSML}no")
    whole = 0
    for seed in range(12):
        said = choice(server, tools=[tool], seed=seed, max_tokens=300, **OFF)
        if said["finish_reason"] == "length":  # chosen at random, a value may have no end
            continue
        (call,) = said["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert arguments.keys() == {"it"} and fits(arguments["it"]), (keyword, arguments)
        whole += 1
        if whole == 2:
            return
    assert whole, keyword


def test_ordinary_schemas_that_no_grammar_knows_are_no_reason_to_refuse(tiny: Server) -> None:
    odd = {
        "type": "function",
        "function": {
            "name": "odd",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string", "format": "made-up"}, "y": {"type": "zzz"}},
                "required": ["y"],
            },
        },
    }
    for more in ({}, {"tool_choice": "required"}):
        body = {"messages": HELLO, "tools": [odd], "max_tokens": 5, **more}
        assert tiny.post(body).status_code == 200
    odd["function"]["strict"] = True  # type: ignore[index]
    response = tiny.post({"messages": HELLO, "tools": [odd]})
    assert response.status_code == 400 and "Invalid schema in tools" in response.text


def test_without_parallel_calls_the_answer_ends_with_the_first(
    scripted: Callable[..., Server],
) -> None:
    block = CALL.replace(f"\n</{DSML}tool_calls>", "")
    invoke = block[block.index(f"<{DSML}invoke") :]
    two = f"{block}\n{invoke}\n</{DSML}tool_calls>"
    said = choice(scripted(two), tools=[WEATHER], **OFF)
    assert [c["index"] for c in said["message"]["tool_calls"]] == [0, 1]
    assert len({c["id"] for c in said["message"]["tool_calls"]}) == 2
    said = choice(scripted(two), tools=[WEATHER], parallel_tool_calls=False, **OFF)
    assert len(said["message"]["tool_calls"]) == 1 and said["finish_reason"] == "tool_calls"


# ---------------------------------------------------------------------- thinking


@pytest.mark.parametrize("budget", [0, 3, 1000])
def test_a_thinking_budget_closes_the_thought(scripted: Callable[..., Server], budget: int) -> None:
    """The scripted model goes on with the token that stands at its place in the script."""
    server = scripted("word " * 40 + "</think>" + "word " * 5)
    response = server.post({"messages": HELLO, "max_thinking_tokens": budget}).json()
    said, usage = response["choices"][0]["message"], response["usage"]
    spent = usage["completion_tokens_details"]["reasoning_tokens"]
    assert spent <= budget + 1  # and the closing tag
    assert (said["reasoning_content"] == "") is (budget == 0)
    assert said["content"].strip() and response["choices"][0]["finish_reason"] == "stop"


def test_logprobs_are_apart_for_reasoning_and_content(scripted: Callable[..., Server]) -> None:
    body = {"logprobs": True, "top_logprobs": 2}
    said = choice(scripted("Let me see</think>3 days"), **body)
    scores = said["logprobs"]
    for part, text in (("reasoning_content", "Let me see"), ("content", "3 days")):
        assert b"".join(bytes(t["bytes"]) for t in scores[part]).decode() == text
        assert all(len(t["top_logprobs"]) == 2 for t in scores[part])


# ---------------------------------------------------------------------- prefixes and gaps


def test_a_prefix_is_continued_on_every_base_url(scripted: Callable[..., Server]) -> None:
    prefix = [*HELLO, {"role": "assistant", "content": "Paris", "prefix": True}]
    for base in ("/v1", "", "/beta"):
        server = scripted("Paris is nice.")
        answer = server.post({"messages": prefix, **OFF}, f"{base}/chat/completions").json()
        assert answer["choices"][0]["message"]["content"] == " is nice."


def test_a_thought_is_continued_too(scripted: Callable[..., Server]) -> None:
    start = {"role": "assistant", "content": "", "reasoning_content": "Let me", "prefix": True}
    said = choice(scripted("Let me see</think>3 days"), messages=[*HELLO, start])
    assert said["message"]["reasoning_content"] == " see"
    assert said["message"]["content"] == "3 days"


def test_a_gap_is_filled_between_the_official_tokens(tiny: Server, tokenizer: Tokenizer) -> None:
    backend = tiny.backend
    body = {"prompt": "The weather in", "suffix": " is nice", "max_tokens": 5, "seed": 1}
    answer = tiny.post(body, "/beta/completions").json()
    assert answer["object"] == "text_completion" and answer["model"] == "v4-tiny"
    expected = [
        tokenizer.bos_id, tokenizer.special_id(FIM_BEGIN), *tokenizer.encode("The weather in"),
        tokenizer.special_id(FIM_HOLE), *tokenizer.encode(" is nice"),
        tokenizer.special_id(FIM_END),
    ]  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == len(expected)
    cache = backend.engine._cache  # type: ignore[attr-defined]
    lease, _, _, reuse = cache.find(expected)
    cache.release(lease)
    assert reuse.hit == len(expected) - 1  # what was computed are these tokens
    text = answer["choices"][0]["text"]
    client = tiny.client.completions
    streamed = list(client.create(model="x", stream=True, **body))  # type: ignore[arg-type]
    assert "".join(c.choices[0].text for c in streamed) == text
    assert streamed[-1].choices[0].finish_reason == "length" and streamed[-1].usage
    # without a suffix it continues; echo gives the prompt back, logprobs the old shape
    whole = client.create(model="x", prompt="The", echo=True, logprobs=2, max_tokens=3, seed=1)
    assert whole.choices[0].text.startswith("The") and whole.usage.prompt_tokens == 1 + len(
        tokenizer.encode("The")
    )  # fmt: skip
    scores = whole.choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == 3
    assert scores.text_offset[0] == 3 and len(scores.top_logprobs[0]) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "missing field `prompt`"),
        ({"prompt": "a", "max_tokens": 0}, "Invalid max_tokens value"),
        ({"prompt": "a", "logprobs": 21}, "the valid range of top_logprobs is [0, 20]"),
        ({"prompt": "a", "stop": ["x"] * 17}, "Stop string array too long: 17"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "a " * 3000}, "This model's maximum context length is 2048 tokens."),
    ],
)
def test_fill_in_the_middle_refuses_in_the_same_words(
    tiny: Server, body: dict[str, Any], message: str
) -> None:
    response = tiny.post(body, "/beta/completions")
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_a_balance_is_there_for_those_who_ask(tiny: Server) -> None:
    balance = tiny.client.get("/../user/balance", cast_to=object)
    assert balance["is_available"] is True  # type: ignore[index]
    assert isinstance(balance["balance_infos"][0]["total_balance"], str)  # type: ignore[index]

"""Whole sessions of Claude Code, Codex and OpenCode, recorded from the programs and sent again.

Nothing here goes through a client library that could smooth a difference over: the requests are
the programs' own (``wire_recordings``), and what is read of an answer is what they read of it.
``tests/clients/record`` makes the recordings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import AGENTS, DONE, SAID, STILL, THOUGHT, TITLE
from live_server import Server
from scripted_models import ScriptedModel, one_torch_thread  # noqa: F401
from wire_recordings import FOLDER, replay

import dsv4
from dsv4.server import LocalBackend
from dsv4.tokenizer import Tokenizer

RECORDINGS = Path(__file__).parent / "recordings"
TOKENIZER = Path(dsv4.__file__).parent / "models" / "v4-nano" / "tokenizer.json"


@pytest.fixture
def scripted() -> Iterator[tuple[Server, ScriptedModel]]:
    model = ScriptedModel(Tokenizer.load(TOKENIZER))
    with Server(LocalBackend(model)) as server:
        yield server, model


class Heard:
    """An answer as the program takes it in: thought, text, calls, and tokens of the prompt."""

    def __init__(self) -> None:
        self.thought = self.text = ""
        self.calls: list[tuple[str, Any]] = []
        self.prompt = self.cached = 0


def heard(target: str, answer: str) -> Heard:
    data = [line[6:] for line in answer.split("\n") if line.startswith("data: ")]
    events = [json.loads(d) for d in data if d != "[DONE]"]
    if "/messages" in target:
        return _messages(events)
    if target.endswith("/responses"):
        return _responses(events)
    assert data[-1] == "[DONE]"
    return _chat(events)


def _messages(events: list[Any]) -> Heard:
    said, usage = Heard(), [events[0]["message"]["usage"]]
    kind = pending = name = ""
    for event in events[1:]:
        if event["type"] == "content_block_start":
            kind, pending = event["content_block"]["type"], ""
            name = event["content_block"].get("name", "")
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            said.thought += delta.get("thinking", "")
            said.text += delta.get("text", "")
            pending += delta.get("partial_json", "")
        elif event["type"] == "content_block_stop" and kind == "tool_use":
            said.calls.append((name, json.loads(pending or "{}")))
        elif event["type"] == "message_delta":
            usage.append(event["usage"])
            assert event["delta"]["stop_reason"] == ("tool_use" if said.calls else "end_turn")
    assert events[-1]["type"] == "message_stop"
    for name in ("input_tokens", "cache_read_input_tokens"):  # the program shows the first of them
        assert usage[0][name] == usage[1][name]
    said.cached = usage[-1]["cache_read_input_tokens"]
    said.prompt = usage[-1]["input_tokens"] + said.cached
    return said


def _responses(events: list[Any]) -> Heard:
    said = Heard()
    for event in events:
        if event["type"] != "response.output_item.done":
            continue
        item = event["item"]
        if item["type"] == "reasoning":
            said.thought += item["content"][0]["text"]
        elif item["type"] == "message":
            said.text += item["content"][0]["text"]
        elif item["type"] == "custom_tool_call":
            said.calls.append((item["name"], {"input": item["input"]}))
        else:
            said.calls.append((item["name"], json.loads(item["arguments"])))
    last = events[-1]
    assert last["type"] == "response.completed" and last["response"]["id"]
    said.prompt = last["response"]["usage"]["input_tokens"]
    said.cached = last["response"]["usage"]["input_tokens_details"]["cached_tokens"]
    return said


def _chat(events: list[Any]) -> Heard:
    said = Heard()
    pending: list[list[str]] = []
    for event in events:
        delta = event["choices"][0]["delta"]
        said.thought += delta.get("reasoning_content") or ""
        said.text += delta.get("content") or ""
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                pending.append([piece["function"]["name"], ""])
            pending[piece["index"]][1] += piece["function"]["arguments"]
    said.calls = [(name, json.loads(arguments)) for name, arguments in pending]
    assert events[-1]["choices"][0]["finish_reason"] == ("tool_calls" if said.calls else "stop")
    said.prompt = events[-1]["usage"]["prompt_tokens"]
    said.cached = events[-1]["usage"]["prompt_cache_hit_tokens"]
    return said


@pytest.mark.parametrize("known", [True, False], ids=["the-same-server", "after-a-restart"])
@pytest.mark.parametrize("name", AGENTS)
def test_a_recorded_session(name: str, known: bool, scripted: tuple[Server, ScriptedModel]) -> None:
    """Each step has the call or text it must have, and begins where the last one ended."""
    server, model = scripted
    agent = AGENTS[name]
    model.script = agent.script(FOLDER)
    got: list[Any] = []
    length = 0
    for body, status, answer in replay(RECORDINGS / f"{name}.json", server.port, known=known):
        if body is None:  # a look whether anyone is there
            continue
        assert status == 200, answer
        said = heard(_target(body), answer)
        assert said.thought in (THOUGHT, "")
        if not body.get("tools"):
            assert said.text in (TITLE, json.dumps({"title": TITLE}))
            continue
        if length and known:
            assert said.cached >= 0.98 * length, "what was said before is computed again"
        length = said.prompt
        assert said.text in (SAID, "") if said.calls else said.text
        got += said.calls or [said.text]
    assert got == agent.answers(FOLDER)
    assert got[-2:] == [DONE, STILL]


def _target(body: Any) -> str:
    if "input" in body:
        return "/responses"
    return "/messages" if "max_tokens" in body and "metadata" in body else "/chat/completions"

"""Whole sessions as Claude Code and Codex send them: raw requests, answers handed back as is.

The requests are written down from what these programs put on the wire; nothing here goes through a
client library that could smooth a difference over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live_server import CALL, Server
from scripted_models import ScriptedModel, one_torch_thread, small_tokenizer  # noqa: F401

from dsv4.encoding import DSML
from dsv4.server import LocalBackend

CLAUDE_HEADERS = {
    "authorization": "Bearer none",
    "x-api-key": "none",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,"
    "context-management-2025-06-27,prompt-caching-scope-2026-01-05,effort-2025-11-24,"
    "context-1m-2025-08-07",
    "x-stainless-timeout": "600",
    "x-stainless-retry-count": "0",
    "x-app": "cli",
    "user-agent": "claude-cli/2.1.284 (external, cli)",
    "content-type": "application/json",
}
USER_ID = json.dumps({"device_id": "d" * 64, "account_uuid": "", "session_id": "1-2-3"})


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[Server, ScriptedModel]]:
    model = ScriptedModel(small_tokenizer())
    with Server(LocalBackend(model)) as server:
        yield server, model


# ---------------------------------------------------------------------- Claude Code


def claude_tools() -> list[dict[str, Any]]:
    """Twenty-one tools; one of them is the one that the scripted model calls."""
    names = [f"Tool{i}" for i in range(20)]
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 0}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return [
        {"name": name, "description": f"What {name} does. " * 3, "input_schema": schema}
        for name in ["get_weather", *names]
    ]


def claude_body(messages: list[Any], turn: int, **more: Any) -> dict[str, Any]:
    """One request of the main loop. The first system block changes with every request."""
    ephemeral = {"type": "ephemeral"}
    return {
        "model": "deepseek-v4-pro",
        "max_tokens": 32000,
        "messages": messages,
        "system": [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.284.{turn}; "
                                     f"cc_entrypoint=cli; cch={turn:05x};"},
            {"type": "text", "text": "You are Claude Code.", "cache_control": ephemeral},
            {"type": "text", "text": "Be an agent. " * 30, "cache_control": ephemeral},
        ],
        "tools": claude_tools(),
        "metadata": {"user_id": USER_ID},
        "thinking": {"type": "adaptive", "display": "omitted"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "stream": True,
        **more,
    }  # fmt: skip


def claude_turn(server: Server, body: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The content blocks, put together as the program does it, and the usage."""
    response = httpx.post(
        f"{server.url}/v1/messages?beta=true", headers=CLAUDE_HEADERS, json=body, timeout=60
    )
    assert response.status_code == 200, response.text
    blocks: list[Any] = []
    usage: dict[str, Any] = {}
    pending = ""
    for line in response.text.split("\n"):
        if not line.startswith("data: "):
            continue
        event = json.loads(line[6:])
        if event["type"] == "message_start":
            usage = event["message"]["usage"]
        elif event["type"] == "content_block_start":
            blocks.append(event["content_block"])
            pending = ""
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                pending += delta["partial_json"]
            else:
                (key,) = set(delta) - {"type"}
                blocks[-1][key] += delta[key]
        elif event["type"] == "content_block_stop" and blocks[-1]["type"] == "tool_use":
            blocks[-1]["input"] = json.loads(pending or "{}")
        elif event["type"] == "message_delta":
            usage = {**usage, **event["usage"]}
    assert event["type"] == "message_stop"
    return blocks, usage


def test_a_session_of_claude_code(scripted: tuple[Server, ScriptedModel]) -> None:
    server, model = scripted
    environment = {"role": "system", "content": "# Environment\nWorking directory: /work"}
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "What is the weather?"}]},
        environment,
    ]
    first = claude_body(messages, 0)
    del first["stream"], first["max_tokens"]
    path = f"{server.url}/v1/messages/count_tokens?beta=true"
    counted = httpx.post(path, headers=CLAUDE_HEADERS, json=first).json()
    shares = []
    for turn in range(4):
        model.script = "I look.</think>Let me look." + CALL if turn < 3 else "Good.</think>Sunny."
        if turn:  # the mark moves on with every request
            messages[-2]["content"][-1]["cache_control"] = {"type": "ephemeral"}
        blocks, usage = claude_turn(server, claude_body(messages, turn))
        total = usage["input_tokens"] + usage["cache_read_input_tokens"]
        shares.append(usage["cache_read_input_tokens"] / total)
        if turn == 0:
            assert counted["input_tokens"] == total
        messages.append({"role": "assistant", "content": blocks})
        if turn < 3:
            assert [b["type"] for b in blocks] == ["thinking", "text", "tool_use"]
            assert blocks[0]["signature"]
            messages += [
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": blocks[2]["id"],
                     "content": [{"type": "text", "text": "sunny"}]}]},
                {"role": "system", "content": f"{1000 - turn} tokens left"},
            ]  # fmt: skip
    assert blocks[-1] == {"type": "text", "text": "Sunny."}
    assert min(shares[1:]) > 0.95, shares
    # a sub-agent: no thinking, and an effort all the same
    small = claude_body(messages[:2], 9, model="deepseek-v4-flash", thinking={"type": "disabled"})
    model.script = "Fine."
    assert claude_turn(server, small)[0] == [{"type": "text", "text": "Fine."}]
    # after --resume: the history without its thinking
    bare = json.loads(json.dumps(messages))
    for message in bare:
        if message["role"] == "assistant":
            message["content"] = [b for b in message["content"] if b["type"] != "thinking"]
    bare.append({"role": "user", "content": "And now?"})
    model.script = "Well.</think>Still sunny."
    blocks, usage = claude_turn(server, claude_body(bare, 10))
    assert blocks[-1]["text"] == "Still sunny."
    assert usage["cache_read_input_tokens"] > 0.95 * usage["input_tokens"]


# ---------------------------------------------------------------------- Codex


PATCH = "*** Begin Patch\n*** Add File: days.txt\n+three\n*** End Patch\n"
PATCHING = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="apply_patch">\n'
    f'<{DSML}parameter name="input" string="true">{PATCH}</{DSML}parameter>\n'
    f"</{DSML}invoke>\n</{DSML}tool_calls>"
)
SHELL = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="shell_command">\n'
    f'<{DSML}parameter name="command" string="true">cat days.txt</{DSML}parameter>\n'
    f"</{DSML}invoke>\n</{DSML}tool_calls>"
)


def codex_body(items: list[Any]) -> dict[str, Any]:
    command = {
        "type": "object",
        "properties": {"command": {"type": "string"}, "timeout_ms": {"type": "number"}},
        "required": ["command"],
        "additionalProperties": False,
    }
    inner = {"type": "function", "name": "search", "strict": False, "parameters": command}
    return {
        "model": "deepseek-v4-pro",
        "instructions": "You are Codex. " * 20,
        "input": items,
        "tools": [
            {"type": "function", "name": "shell_command", "strict": False, "parameters": command},
            {"type": "custom", "name": "apply_patch", "description": "Edits files.",
             "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.*/s"}},
            {"type": "namespace", "name": "mcp__docs", "tools": [inner]},
            {"type": "web_search", "external_web_access": False},
            {"type": "image_generation", "output_format": "png"},
            {"type": "tool_search", "execution": "client"},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "high", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-aaaa",
        "text": {"verbosity": "low"},
    }  # fmt: skip


def codex_turn(server: Server, items: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """What the program keeps of a stream: finished items, and the usage at the end."""
    headers = {"authorization": "Bearer none", "originator": "codex_cli_rs",
               "session_id": "0199-aaaa", "accept": "text/event-stream"}  # fmt: skip
    response = httpx.post(
        f"{server.url}/v1/responses", headers=headers, json=codex_body(items), timeout=60
    )
    assert response.status_code == 200, response.text
    data = [json.loads(x[6:]) for x in response.text.split("\n") if x.startswith("data: ")]
    assert data[-1]["type"] == "response.completed" and data[-1]["response"]["id"]
    done = [d["item"] for d in data if d["type"] == "response.output_item.done"]
    return done, data[-1]["response"]["usage"]


def test_a_session_of_codex(scripted: tuple[Server, ScriptedModel]) -> None:
    server, model = scripted

    def message(role: str, text: str) -> dict[str, Any]:
        return {
            "type": "message", "role": role, "content": [{"type": "input_text", "text": text}]
        }  # fmt: skip

    items: list[Any] = [
        message("developer", "<permissions>read only</permissions>"),
        message("user", "<environment_context>/work</environment_context>"),
        message("user", "Write three days"),
    ]
    model.script = "I patch.</think>" + PATCHING
    done, _ = codex_turn(server, items)
    assert [i["type"] for i in done] == ["reasoning", "custom_tool_call"]
    assert done[1]["input"] == PATCH
    output = {"type": "custom_tool_call_output", "call_id": done[1]["call_id"], "output": "Done"}
    items += [*done, output]

    model.script = "I look.</think>" + SHELL
    done, usage = codex_turn(server, items)
    assert json.loads(done[1]["arguments"]) == {"command": "cat days.txt"}
    assert usage["input_tokens_details"]["cached_tokens"] > 0.9 * usage["input_tokens"]
    items += [*done, {"type": "function_call_output", "call_id": done[1]["call_id"],
                      "output": "Exit code: 0\nthree\n"}]  # fmt: skip

    model.script = "Good.</think>It is written."
    done, usage = codex_turn(server, items)
    assert done[-1]["content"][0]["text"] == "It is written."
    assert usage["input_tokens_details"]["cached_tokens"] > 0.9 * usage["input_tokens"]
    items += done

    model.script = "Sum up.</think>Three days are written."
    done, _ = codex_turn(server, [*items, {"type": "compaction_trigger"}])
    assert [i["type"] for i in done].count("compaction") == 1
    model.script = "Yes.</think>Four."
    done, usage = codex_turn(server, [*done, message("user", "One more")])
    assert done[-1]["content"][0]["text"] == "Four."

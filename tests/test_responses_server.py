"""The Responses API over a real socket, with the real client and with what Codex sends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from live_server import CALL, HELLO, WEATHER, Server
from scripted_models import ScriptedModel, one_torch_thread, small_tokenizer  # noqa: F401

from dsv4.encoding import DSML
from dsv4.server import LocalBackend
from dsv4.server.backend import ContentDelta, Finish, ScriptedBackend, Usage

TOOL = {"type": "function", **WEATHER["function"]}
OFF = {"reasoning": {"effort": "none"}}


@pytest.fixture(scope="module")
def scripted_server() -> Iterator[tuple[Server, ScriptedModel]]:
    model = ScriptedModel(small_tokenizer())
    with Server(LocalBackend(model)) as server:
        yield server, model


@pytest.fixture
def say(scripted_server: tuple[Server, ScriptedModel]) -> Callable[[str], Server]:
    server, model = scripted_server

    def script(text: str) -> Server:
        model.script = text
        return server

    return script


def ask(server: Server, **more: Any) -> Any:
    return server.client.responses.create(**{"model": "x", "input": "Hello", **more})


def events(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = server.post({"model": "x", "stream": True, **body}, "/v1/responses")
    assert response.status_code == 200, response.text
    lines = response.text.split("\n")
    named = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert named == [d["type"] for d in data] and "[DONE]" not in response.text
    assert [d["sequence_number"] for d in data] == list(range(len(data)))
    return data


def test_reasoning_comes_before_the_message(say: Callable[[str], Server]) -> None:
    answer = ask(say("Let me see.</think>Paris it is."))
    reasoning, message = answer.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "Let me see.")
    assert (message.type, answer.output_text) == ("message", "Paris it is.")
    assert (answer.status, answer.model, answer.store) == ("completed", "v4-scripted", False)
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens > 2
    assert ask(say("Paris."), **OFF).output_text == "Paris."


def test_the_stream_opens_and_closes_everything(say: Callable[[str], Server]) -> None:
    server = say("Let me see.</think>I will look." + CALL)
    body = {"input": "Hello", "tools": [TOOL]}
    data = events(server, body)
    kinds = [d["type"] for d in data]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    done = [d["item"] for d in data if d["type"] == "response.output_item.done"]
    assert done == data[-1]["response"]["output"]
    assert [i["type"] for i in done] == ["reasoning", "message", "function_call"]
    assert json.loads(done[2]["arguments"]) == {"city": "Paris", "days": 3}
    texts = [d["delta"] for d in data if d["type"] == "response.reasoning_text.delta"]
    assert "".join(texts) == "Let me see."
    with server.client.responses.stream(model="x", **body) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output[2].name == "get_weather"


def test_a_call_and_its_output_go_round(say: Callable[[str], Server]) -> None:
    first = ask(say("Look.</think>" + CALL), tools=[TOOL])
    reasoning, call = first.output
    items = [
        {"role": "user", "content": "Hello"},
        reasoning.to_dict(),
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    answer = ask(say("Aha.</think>Sunny."), input=items, tools=[TOOL])
    assert answer.output_text == "Sunny."
    assert answer.usage.input_tokens_details.cached_tokens > 50  # the first turn, byte for byte


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_text_formats_hold(say: Callable[[str], Server], kind: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"type": kind, **({"name": "s", "schema": schema} if kind == "json_schema" else {})}
    answer = ask(say('So.</think>{"a": 3}'), text={"format": wanted})
    assert json.loads(answer.output_text) == {"a": 3}
    assert answer.text.format.to_dict() == wanted, "the answer says which format it was held to"


def test_a_cut_answer_is_incomplete(say: Callable[[str], Server]) -> None:
    answer = ask(say("Paris for 3 days"), max_output_tokens=2, **OFF)
    assert answer.status == answer.output[0].status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_what_codex_sends_is_answered(say: Callable[[str], Server]) -> None:
    patch = "*** Begin Patch\n*** End Patch"
    block = (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="apply_patch">\n'
        f'<{DSML}parameter name="input" string="true">{patch}</{DSML}parameter>\n'
        f'</{DSML}invoke>\n<{DSML}invoke name="mcp__files__read">\n\n</{DSML}invoke>\n'
        f"</{DSML}tool_calls>"
    )
    body: dict[str, Any] = {
        "instructions": "You are a coding agent",
        "input": [
            {"type": "message", "role": "developer",
             "content": [{"type": "input_text", "text": "Be brief"}]},
            {"type": "message", "role": "user",
             "content": [{"type": "input_text", "text": "Go"},
                         {"type": "input_image", "image_url": "data:x"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "xyz"},
            {"type": "web_search_call", "id": "ws_1"},
            {"type": "something_new", "payload": 1},
        ],
        "tools": [
            {"type": "custom", "name": "apply_patch", "description": "Edit files",
             "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}},
            {"type": "namespace", "name": "mcp__files",
             "tools": [{"type": "function", "name": "read", "parameters": {"type": "object"}}]},
            {"type": "web_search"}, {"type": "image_generation"}, {"type": "tool_search"},
            {"type": "local_shell"}, {"type": "custom", "name": "other"}, {"type": "unheard_of"},
        ],
        "tool_choice": "auto", "parallel_tool_calls": True, "store": False, "stream": True,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
        "reasoning": {"effort": "high", "summary": "auto"}, "text": {"verbosity": "low"},
    }  # fmt: skip
    data = events(say("Hm.</think>" + block), body)
    done = data[-1]["response"]["output"]
    assert [i["type"] for i in done] == ["reasoning", "custom_tool_call", "function_call"]
    assert done[1]["input"] == patch
    assert (done[2]["namespace"], done[2]["name"]) == ("mcp__files", "read")
    streamed = [d for d in data if d["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(d["delta"] for d in streamed) == patch
    outputs = [
        {"type": "custom_tool_call_output", "call_id": done[1]["call_id"], "output": "ok"},
        {"type": "function_call_output", "call_id": done[2]["call_id"],
         "output": [{"type": "input_text", "text": "text"}]},
    ]  # fmt: skip
    again = {**body, "input": [*body["input"], *done, *outputs]}
    assert events(say("a</think>Done."), again)[-1]["response"]["status"] == "completed"


def test_logprobs_of_the_answer_come_when_asked_for(say: Callable[[str], Server]) -> None:
    server = say("Well.</think>Paris it is.")
    body = {"input": "Hello", "top_logprobs": 2}
    data = events(server, body)
    (message,) = [i for i in data[-1]["response"]["output"] if i["type"] == "message"]
    (part,) = message["content"]
    assert "".join(s["token"] for s in part["logprobs"]) == part["text"] == "Paris it is."
    assert all(len(s["top_logprobs"]) == 2 and s["logprob"] <= 0 for s in part["logprobs"])
    deltas = [d for d in data if d["type"] == "response.output_text.delta"]
    assert [s for d in deltas for s in d["logprobs"]] == part["logprobs"]
    included = ask(server, include=["message.output_text.logprobs"])
    assert included.output_text == "Paris it is."
    assert [s.top_logprobs for s in included.output[1].content[0].logprobs] == [[]] * len(
        part["logprobs"]
    )
    assert ask(server).output[1].content[0].logprobs == []
    refused = server.post({**body, "top_logprobs": 21}, "/v1/responses")
    assert refused.status_code == 400 and "[0, 20]" in refused.text


def test_a_compaction_is_one_item_that_can_be_read_again(say: Callable[[str], Server]) -> None:
    items: list[Any] = [{"role": "user", "content": "days days"}, {"type": "compaction_trigger"}]
    answer = ask(say("Hm.</think>The weather in Paris."), input=items, tools=[TOOL])
    (item,) = [i for i in answer.output if i.type == "compaction"]
    assert [i.type for i in answer.output].count("message") == 0
    script = [ContentDelta("ok"), Finish("stop", Usage(1, 1))]
    backend = ScriptedBackend(script)
    with Server(backend) as server:
        ask(server, input=[item.to_dict(), *HELLO])
        said = backend.requests[0].messages  # type: ignore[union-attr]
        assert "The weather in Paris." in said[0]["content"]
        ask(server, input=[{"type": "compaction", "encrypted_content": "not ours"}, *HELLO])
        assert "cannot be read" in backend.requests[1].messages[0]["content"]  # type: ignore[union-attr]


def test_failures_are_events_and_refusals_have_a_status() -> None:
    with Server(ScriptedBackend([ContentDelta("He"), RuntimeError("secret")])) as server:
        data = events(server, {"input": "Hello"})
        assert data[-1]["type"] == "response.failed"
        assert data[-1]["response"]["error"]["code"] == "server_error"
        assert "secret" not in str(data)
        for body, words in (
            ({}, "input or instructions"),
            ({"input": 5}, "input"),
            ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "needs a schema"),
            ({"input": "a", "temperature": 9}, "the valid range of temperature is [0, 2]"),
        ):
            response = server.post({"model": "x", **body}, "/responses")
            assert response.status_code == 400 and words in response.json()["error"]["message"]

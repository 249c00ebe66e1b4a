"""The Anthropic API over a real socket, with the real client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest
from live_server import CALL, HELLO, Server
from scripted_models import ScriptedModel, one_torch_thread, small_tokenizer  # noqa: F401

from dsv4.server import LocalBackend
from dsv4.server.backend import ContentDelta, ScriptedBackend

TOOL = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
OFF = {"type": "disabled"}


@pytest.fixture(scope="module")
def scripted_server() -> Iterator[tuple[Server, ScriptedModel]]:
    model = ScriptedModel(small_tokenizer())
    with Server(LocalBackend(model), keep_alive=0.1) as server:
        yield server, model


@pytest.fixture
def say(
    scripted_server: tuple[Server, ScriptedModel],
) -> Iterator[Callable[..., anthropic.Anthropic]]:
    server, model = scripted_server

    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:

        def script(text: str, pause: float = 0.0) -> anthropic.Anthropic:
            model.script, model.pause = text, pause
            return client

        yield script
    model.script, model.pause = "", 0.0


def ask(client: anthropic.Anthropic, **more: Any) -> Any:
    body = {"model": "claude-sonnet-5", "messages": HELLO, "max_tokens": 500, **more}
    return client.messages.create(**body)


def post(server: Server, body: Any, path: str = "/v1/messages") -> Any:
    return server.post({"model": "x", "max_tokens": 50, **body}, path)


def test_thinking_and_text_come_as_blocks_with_a_signature(
    say: Callable[..., anthropic.Anthropic],
) -> None:
    client = say("Let me see: 3 days.</think>Paris it is.")
    message = ask(client)
    thinking, text = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "Let me see: 3 days.")
    assert thinking.signature and thinking.signature == message.id
    assert (text.type, text.text) == ("text", "Paris it is.")
    assert (message.stop_reason, message.model, message.role) == (
        "end_turn", "v4-scripted", "assistant",
    )  # fmt: skip
    assert message.usage.input_tokens > 0 and message.usage.output_tokens > 5
    (only,) = ask(say("Paris."), thinking=OFF).content
    assert only.text == "Paris."


def test_the_stream_is_the_same_message_in_the_documented_order(
    say: Callable[..., anthropic.Anthropic],
) -> None:
    client = say("Let me see.</think>I will look." + CALL)
    with client.messages.stream(model="x", messages=HELLO, max_tokens=500, tools=[TOOL]) as stream:
        kinds = [e.type for e in stream if e.type in vars(anthropic) or "_" in e.type]
        final = stream.get_final_message()
    assert [b.type for b in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[0].signature == final.id
    assert final.content[2].input == {"city": "Paris", "days": 3}
    assert final.stop_reason == "tool_use"
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    raw = list(client.messages.create(
        model="x", messages=HELLO, max_tokens=500, tools=[TOOL], stream=True
    ))  # fmt: skip
    assert raw[0].type == "message_start" and raw[0].message.content == []
    assert raw[0].message.usage.input_tokens + raw[0].message.usage.cache_read_input_tokens > 5
    opened: list[int] = []
    for event in raw:
        if event.type == "content_block_start":
            assert event.index == len(opened)
            opened.append(event.index)
            last = ""
        elif event.type == "content_block_delta":
            assert event.index == opened[-1]
            last = event.delta.type
        elif event.type == "content_block_stop" and event.index == 0:
            assert last == "signature_delta"
    assert opened == [0, 1, 2]
    assert [e.type for e in raw[-2:]] == ["message_delta", "message_stop"]
    assert raw[-2].usage.output_tokens > 10


def test_a_whole_tool_loop_with_results_in_one_turn(
    say: Callable[..., anthropic.Anthropic],
) -> None:
    client = say("Look.</think>" + CALL)
    first = ask(client, tools=[TOOL])
    (use,) = [b for b in first.content if b.type == "tool_use"]
    history: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": [b.to_dict() for b in first.content]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result", "tool_use_id": use.id, "is_error": False,
                    "content": [{"type": "text", "text": "sunny"}],
                },
                {"type": "text", "text": "And then?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]  # fmt: skip
    answer = ask(say("It is sunny.</think>Nice."), messages=history, tools=[TOOL])
    assert answer.content[-1].text == "Nice." and answer.stop_reason == "end_turn"
    assert answer.usage.cache_read_input_tokens > 50  # the conversation so far


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_forced_tool_is_called_even_when_thinking(
    say: Callable[..., anthropic.Anthropic], choice: Any
) -> None:
    message = ask(say("Hm.</think>" + CALL), tools=[TOOL], tool_choice=choice)
    assert [b.type for b in message.content] == ["thinking", "tool_use"]


def test_counted_tokens_are_those_of_the_request(
    say: Callable[..., anthropic.Anthropic],
) -> None:
    client = say("a</think>b")
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc;"},
        {"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}},
    ]
    more: dict[str, Any] = {"messages": HELLO, "system": system, "tools": [TOOL]}
    counted = client.messages.count_tokens(model="x", **more).input_tokens
    for _ in range(2):
        usage = ask(client, **more).usage
        whole = usage.input_tokens + usage.cache_read_input_tokens
        assert counted == whole + usage.cache_creation_input_tokens
    assert usage.cache_read_input_tokens > usage.input_tokens


def test_stop_sequences_and_limits_have_their_reasons(
    say: Callable[..., anthropic.Anthropic],
) -> None:
    message = ask(say("Paris for 3 days."), stop_sequences=["for"], thinking=OFF)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "for")
    assert message.content[0].text == "Paris "
    message = ask(say("Paris for 3 days."), max_tokens=2, thinking=OFF)
    assert message.stop_reason == "max_tokens"


def test_a_trailing_assistant_message_is_continued(
    say: Callable[..., anthropic.Anthropic],
) -> None:
    history = [*HELLO, {"role": "assistant", "content": "Paris"}]
    assert ask(say("Paris is."), messages=history, thinking=OFF).content[0].text == " is."


def test_silence_is_filled_with_pings(scripted_server: tuple[Server, ScriptedModel]) -> None:
    server, model = scripted_server
    model.script, model.pause = "x</think>y", 0.15
    text = post(server, {"messages": HELLO, "stream": True}).text
    model.pause = 0.0
    assert 'event: ping\ndata: {"type":"ping"}\n\n' in text


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "Failed to parse the request body as JSON"),
        ({"messages": []}, 400, "Empty input messages"),
        ({"messages": HELLO, "max_tokens": None}, 400, "max_tokens"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0]: missing field `content`"),
        ({"messages": [{"role": "robot", "content": ""}]}, 400, "unknown variant `robot`"),
        ({"messages": HELLO, "temperature": 3}, 400, "range of temperature is [0, 2]"),
        ({"messages": HELLO, "model": "deepseek-chat"}, 400, "you passed deepseek-chat."),
    ],
)
def test_errors_have_the_shape_that_the_client_maps(
    scripted_server: tuple[Server, ScriptedModel], body: Any, status: int, words: str
) -> None:
    server, _ = scripted_server
    response = server.post(body, "/v1/messages") if isinstance(body, bytes) else post(server, body)
    error = response.json()
    assert response.status_code == status and error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error" and words in error["error"]["message"]
    assert error["request_id"]


def test_failures_and_keys_are_the_clients_own_errors() -> None:
    script = [ContentDelta("He"), RuntimeError("secret")]
    with Server(ScriptedBackend(script), api_key="sesame") as server:
        good = anthropic.Anthropic(base_url=server.url + "/anthropic", api_key="sesame")
        with good, pytest.raises(anthropic.APIStatusError) as broken:
            with good.messages.stream(model="x", messages=HELLO, max_tokens=9) as stream:
                list(stream)
        assert "secret" not in str(broken.value) and "api_error" in str(broken.value)
        bad = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
        with bad, pytest.raises(anthropic.AuthenticationError):
            ask(bad)
        with anthropic.Anthropic(base_url=server.url, api_key=None, auth_token="sesame") as both:
            assert both.models.list().data[0].id == "scripted"


def test_content_that_is_null_is_empty(say: Callable[..., anthropic.Anthropic]) -> None:
    history = [*HELLO, {"role": "assistant", "content": None}, *HELLO]
    assert ask(say("Yes."), messages=history, thinking=OFF).content[0].text == "Yes."


def test_every_base_url_answers(scripted_server: tuple[Server, ScriptedModel]) -> None:
    server, model = scripted_server
    model.script = "a</think>b"
    for path in (
        "/v1/messages", "/v1/messages?beta=true", "/anthropic/v1/messages", "/anthropic/messages"
    ):  # fmt: skip
        assert post(server, {"messages": HELLO}, path).json()["content"][-1]["text"] == "b"
        counted = post(server, {"messages": HELLO}, path.split("?")[0] + "/count_tokens")
        assert json.loads(counted.text)["input_tokens"] > 0

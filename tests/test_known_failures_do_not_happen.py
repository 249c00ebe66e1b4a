"""Twenty-five ways in which servers of these models broke real clients, none of them here.

One test for each, named after the failure it keeps away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from live_server import CALL, HELLO, OFF, WEATHER, Server
from scripted_models import ScriptedModel, one_torch_thread, small_tokenizer  # noqa: F401

from dsv4.completion import ContentDelta as ParsedContent
from dsv4.completion import StreamingParser
from dsv4.encoding import ASSISTANT, BOS, DSML, THINK, USER
from dsv4.server import LocalBackend
from dsv4.server.backend import ContentDelta, Finish, ScriptedBackend, Usage

Say = Callable[..., Server]
ANTHROPIC_TOOL = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
CODEX_TOOL = {"type": "function", **WEATHER["function"]}


@pytest.fixture(scope="module")
def scripted_server() -> Iterator[tuple[Server, ScriptedModel]]:
    model = ScriptedModel(small_tokenizer())
    with Server(LocalBackend(model), keep_alive=0.1) as server:
        yield server, model


@pytest.fixture
def say(scripted_server: tuple[Server, ScriptedModel]) -> Iterator[Say]:
    """Sets what the model says; ``server.prompts`` is what it was given."""
    server, model = scripted_server
    server.prompts = []  # type: ignore[attr-defined]

    def script(text: str, pause: float = 0.0) -> Server:
        def answer(prompt: str) -> str:
            if not server.prompts or server.prompts[-1] != prompt:  # type: ignore[attr-defined]
                server.prompts.append(prompt)  # type: ignore[attr-defined]
            return text

        model.script, model.pause = answer, pause
        return server

    yield script
    model.script, model.pause = "", 0.0


def chat(server: Server, messages: Any = HELLO, **more: Any) -> dict[str, Any]:
    response = server.post({"messages": messages, **more})
    assert response.status_code == 200, response.text
    return dict(response.json())


def said(answer: dict[str, Any]) -> dict[str, Any]:
    return dict(answer["choices"][0]["message"])


def messages_api(server: Server, messages: Any = HELLO, **more: Any) -> dict[str, Any]:
    body = {"model": "x", "max_tokens": 300, "messages": messages, **more}
    response = server.post(body, "/v1/messages")
    assert response.status_code == 200, response.text
    return dict(response.json())


def called(server: Server, **more: Any) -> dict[str, Any]:
    """The assistant's message of a first turn that ends in a call."""
    message = said(chat(server, tools=[WEATHER], **more))
    assert message["tool_calls"]
    return message


def result(message: dict[str, Any], text: str = "sunny") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": text}


def prompt(server: Server) -> str:
    return str(server.prompts[-1])  # type: ignore[attr-defined]


@pytest.mark.parametrize("sent", ["absent", "null", "empty", "kept"])
def test_01_dropped_reasoning_content_bricks_no_session(say: Say, sent: str) -> None:
    message = called(say("I should look.</think>" + CALL))
    if sent == "absent":
        del message["reasoning_content"]
    elif sent != "kept":
        message["reasoning_content"] = None if sent == "null" else ""
    answer = chat(say("So.</think>Nice."), [*HELLO, message, result(message)], tools=[WEATHER])
    assert said(answer)["content"] == "Nice."
    assert f"{THINK}I should look.</think>" in prompt(say("")), "restored by the call's id"
    stranger = {**message, "tool_calls": [{**message["tool_calls"][0], "id": "elsewhere"}]}
    stranger.pop("reasoning_content", None)
    chat(say("So.</think>Nice."), [*HELLO, stranger, result(stranger)], tools=[WEATHER])
    assert f"{ASSISTANT}{THINK}</think>" in prompt(say("")), "an empty thought when unknown"


def test_02_missing_foreign_or_unsigned_thinking_blocks_are_taken(say: Say) -> None:
    first = messages_api(say("Look.</think>" + CALL), tools=[ANTHROPIC_TOOL])
    thinking, use = first["content"]
    assert thinking["signature"]
    back = {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": use["id"], "content": "sunny"}]}  # fmt: skip
    for blocks in (
        [thinking, use],
        [use],
        [{"type": "thinking", "thinking": "Mine", "signature": "EqQBCkYI=="}, use],
        [{"type": "thinking", "thinking": "Mine"}, use],
        [{"type": "redacted_thinking", "data": "xx"}, use],
    ):
        turn = {"role": "assistant", "content": blocks}
        answer = messages_api(
            say("a</think>Nice."), [*HELLO, turn, back], tools=[ANTHROPIC_TOOL]
        )  # fmt: skip
        assert answer["content"][-1]["text"] == "Nice."


def test_03_tool_markup_never_leaks_however_it_is_cut(say: Say) -> None:
    chunks = say("Look." + CALL).chunks({"messages": HELLO, "tools": [WEATHER], **OFF})
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content") or "" for d in deltas) == "Look."
    text = "2 < 3." + CALL
    for size in range(1, 30):
        parser = StreamingParser("chat", [WEATHER])
        out = [e for i in range(0, len(text), size) for e in parser.feed(text[i : i + size])]
        out += parser.finish("stop").events
        assert "".join(e.text for e in out if isinstance(e, ParsedContent)) == "2 < 3."


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.replace(f"<{DSML}tool_calls>\n", "").replace(f"\n</{DSML}tool_calls>", ""),
        lambda c: c.replace("tool_calls", "toolcalls"),
        lambda c: c.replace("tool_calls", "function_calls"),
        lambda c: c.replace(DSML, "|DSML|"),
        lambda c: c.replace(f"<{DSML}", "<DSML｜"),
        lambda c: c.replace(DSML, ""),
        lambda c: c.replace(f"\n</{DSML}tool_calls>", ""),
    ],
)
def test_04_drifted_markup_is_still_a_call_where_it_is_plainly_meant(
    say: Say, change: Callable[[str], str]
) -> None:
    drifted = change(CALL)
    assert drifted != CALL
    (call,) = said(chat(say("Look." + drifted), tools=[WEATHER], **OFF))["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris", "days": 3}
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        assert "tool_calls" not in said(chat(say("Look." + drifted), **more, **OFF))
    undeclared = drifted.replace("get_weather", "rm_rf")
    assert "tool_calls" not in said(chat(say(undeclared), tools=[WEATHER], **OFF))


def test_05_a_call_before_the_end_of_thinking_is_made_and_a_quoted_one_is_not(say: Say) -> None:
    answer = chat(say("I will look." + CALL), tools=[WEATHER])
    assert said(answer)["tool_calls"] and answer["choices"][0]["finish_reason"] == "tool_calls"
    answer = chat(say(f"A call is `{CALL}` I think.</think>Fine."), tools=[WEATHER])
    assert "tool_calls" not in said(answer) and said(answer)["content"] == "Fine."


LATER_ENCODER = """
import nothing_that_exists
HIGH = "Reasoning Effort: Absolute maximum, in this checkpoint's words.\\n\\n"
MOST = "Reasoning Effort: Beyond maximum, in this checkpoint's words.\\n\\n"
"""


def test_06_effort_tiers_are_those_of_the_weights(tmp_path: Path) -> None:
    """A checkpoint's own encoder says which table is its; the file is read, not run."""
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "encoding_dsv4.py").write_text(LATER_ENCODER, encoding="utf-8")
    for folder, tiers in (
        (None, {"low": "", "medium": "", "high": "", "xhigh": "Absolute", "max": "Absolute"}),
        (tmp_path, {"low": "", "medium": "Absolute", "high": "Absolute", "xhigh": "Absolute",
                    "max": "Beyond"}),
    ):  # fmt: skip
        model = ScriptedModel(small_tokenizer())
        model.folder = folder
        prompts: list[str] = []
        model.script = lambda prompt: prompts.append(prompt) or "a</think>b"  # type: ignore[func-returns-value]  # noqa: B023
        with Server(LocalBackend(model)) as server:
            for effort, text in tiers.items():
                prompts.clear()
                chat(server, reasoning_effort=effort)
                said_first = prompts[0].removeprefix(BOS)
                asks = f"Reasoning Effort: {text}" if text else USER
                assert said_first.startswith(asks), (folder, effort)
                assert ("this checkpoint's words" in said_first) is bool(folder and text)


@pytest.mark.parametrize(
    "messages",
    [
        [*HELLO, {"role": "system", "content": "Now be brief"}],
        [*HELLO, {"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}, *HELLO],
        [{"role": "system", "content": "Only this"}],
    ],
)
def test_07_system_text_at_the_end_or_between_still_gets_an_answer(say: Say, messages: Any) -> None:
    assert said(chat(say("a</think>b"), messages))["content"] == "b"
    assert prompt(say("")).endswith(f"{ASSISTANT}{THINK}")


def test_08_system_messages_stay_in_place_and_keep_the_cache(say: Say) -> None:
    system = {"role": "system", "content": "# Environment days days days"}
    history = [*HELLO, system, {"role": "assistant", "content": "Paris."}, *HELLO]
    first = messages_api(say("a</think>b"), history)
    head = prompt(say(""))
    again = messages_api(
        say("a</think>b"), [*history, {"role": "assistant", "content": "b"}, system, *HELLO]
    )  # fmt: skip
    grown = prompt(say(""))
    common = next((i for i, (a, b) in enumerate(zip(head, grown, strict=False)) if a != b), 10**9)
    assert common >= head.rindex(ASSISTANT), "nothing was hoisted to the head"
    usage = again["usage"]
    assert usage["cache_read_input_tokens"] > first["usage"]["input_tokens"] // 2


def test_09_volatile_headers_and_moving_cache_marks_do_not_end_the_cache(say: Say) -> None:
    def ask(header: str, mark: int) -> dict[str, Any]:
        system = [
            {"type": "text", "text": f"x-anthropic-billing-header: cch={header};"},
            {"type": "text", "text": "Paris weather string true false name " * 4},
            {"type": "text", "text": "days"},
        ]
        system[mark]["cache_control"] = {"type": "ephemeral"}  # type: ignore[assignment]
        return messages_api(say("a</think>b"), system=system)["usage"]

    ask("one", 1)
    usage = ask("two", 2)
    assert usage["input_tokens"] <= 2 < usage["cache_read_input_tokens"]


def test_10_a_user_id_may_be_json(say: Say) -> None:
    user = json.dumps({"device_id": "a", "account": {"x": 1}})
    assert messages_api(say("a</think>b"), metadata={"user_id": user})["content"]
    assert chat(say("a</think>b"), user_id=user) and chat(say("a</think>b"), user="a b/c")


def test_11_disabled_thinking_wins_over_an_effort(say: Say) -> None:
    answer = messages_api(
        say("b"), thinking={"type": "disabled"}, output_config={"effort": "max"}
    )  # fmt: skip
    assert [b["type"] for b in answer["content"]] == ["text"]
    assert "reasoning_content" not in said(chat(say("b"), reasoning_effort="max", **OFF))


def test_12_forced_tools_work_while_thinking(say: Say) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        message = said(chat(say("Hm.</think>" + CALL), tools=[WEATHER], tool_choice=choice))
        assert message["tool_calls"] and message["reasoning_content"] == "Hm."
    answer = messages_api(
        say("Hm.</think>" + CALL), tools=[ANTHROPIC_TOOL],
        tool_choice={"type": "tool", "name": "get_weather"},
    )  # fmt: skip
    assert [b["type"] for b in answer["content"]] == ["thinking", "tool_use"]
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    for choice in ({"type": "tool", "name": "web_search"}, {"type": "any"}):  # hosted: not here
        answer = messages_api(say("Hm.</think>So."), tools=[search], tool_choice=choice)
        assert answer["content"][-1]["text"] == "So."


def test_13_rewritten_history_is_replayed_byte_for_byte(say: Say) -> None:
    """Arguments dumped anew, text trimmed: the next prompt still goes on from the model's bytes."""
    odd = CALL.replace(">3<", "> 3<").replace("tool_calls>\n<", "tool_calls>\n\n<", 1)
    message = called(say("I should look.</think>Look. \n" + odd))
    call = message["tool_calls"][0]["function"]
    call["arguments"] = json.dumps(json.loads(call["arguments"]), separators=(",", ":"))
    message["content"] = message["content"].strip()
    history = [*HELLO, message, result(message)]
    answer = chat(say("a</think>b"), history, tools=[WEATHER])
    assert "Look. \n" + odd in prompt(say(""))
    usage = answer["usage"]
    new = len("<tool_result>sunny</tool_result>") + 5  # in characters: few of them are merged
    assert usage["prompt_cache_miss_tokens"] <= new, "only the result is new"
    call["arguments"] = '{"city": "Rome"}'  # it means something else now, so it is not replayed
    chat(say("a</think>b"), history, tools=[WEATHER])
    assert "Rome" in prompt(say("")) and odd not in prompt(say(""))


@pytest.mark.parametrize("script", ["Hm.</think>", "Hm.</think>\n\n", "Only a thought"])
def test_14_an_empty_answer_is_tried_again(say: Say, script: str) -> None:
    server = say(script)
    before = server.backend.load()["empty_answers_retried"]
    answer = chat(server, seed=1)
    assert server.backend.load()["empty_answers_retried"] == before + 1
    assert said(answer)["content"].strip("\n") and answer["choices"][0]["finish_reason"] == "stop"


def test_15_a_schema_holds_after_the_thought_and_never_within(say: Say) -> None:
    server = say('I think {"a": "no"} is not it.</think>{"a": 1}')
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    message = said(chat(server, response_format=wanted))
    assert message["reasoning_content"] == 'I think {"a": "no"} is not it.'
    assert json.loads(message["content"]) == {"a": 1}
    spaces = say('{"a":' + " " * 300 + "1}")
    content = said(chat(spaces, response_format=wanted, max_tokens=400, **OFF))["content"]
    assert max(map(len, re.findall(r"\s+", content))) <= 24, "white space cannot run away"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('<{0}parameter name="days" string="true">5</{0}parameter>', {"days": 5}),
        ('<{0}parameter name="arguments" string="false">{{"days": 5}}</{0}parameter>', {"days": 5}),
        ('<{0}parameter name="input" string="true">{{"days": 5}}</{0}parameter>', {"days": 5}),
        ('<{0}parameter name="tags" string="true">["a"]</{0}parameter>', {"tags": ["a"]}),
        ('<{0}parameter name="note" string="false">5</{0}parameter>', {"note": "5"}),
    ],
)
def test_16_arguments_have_their_declared_types(
    say: Say, written: str, meant: dict[str, Any]
) -> None:
    tool = {"type": "function", "function": {"name": "plan", "parameters": {
        "type": "object",
        "properties": {
            "days": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "note": {"type": "string"},
        },
    }}}  # fmt: skip
    block = (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="plan">\n{written.format(DSML)}\n'
        f"</{DSML}invoke>\n</{DSML}tool_calls>"
    )
    (call,) = said(chat(say(block), tools=[tool], **OFF))["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == meant


def test_17_half_a_call_is_never_published(say: Say) -> None:
    for limit in (12, 25, 40):
        body = {"messages": HELLO, "tools": [WEATHER], "max_tokens": limit, **OFF}
        chunks = say(CALL).chunks(body)
        assert not any(c["choices"][0]["delta"].get("tool_calls") for c in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    without_city = CALL.replace('name="city"', 'name="town"')
    assert "tool_calls" not in said(chat(say(without_city), tools=[WEATHER], **OFF))


def test_18_codex_tools_and_items_of_unknown_kinds_are_taken(say: Say) -> None:
    body: dict[str, Any] = {
        "model": "x",
        "input": [
            {"type": "additional_tools", "tools": [CODEX_TOOL]},
            {"type": "never_heard_of"},
            *HELLO,
        ],
        "tools": [{"type": "web_search"}, {"type": "custom", "name": "other"}, {"type": "new"}],
    }
    answer = say("Hm.</think>" + CALL).post(body, "/v1/responses").json()
    assert [i["type"] for i in answer["output"]] == ["reasoning", "function_call"]
    body["input"].append({"type": "compaction_trigger"})
    answer = say("Hm.</think>A summary.").post(body, "/v1/responses").json()
    assert [i["type"] for i in answer["output"]].count("compaction") == 1


def test_19_keep_alives_break_no_parser_and_late_errors_come_in_band(say: Say) -> None:
    text = say("x</think>y", pause=0.15).post({"messages": HELLO, "stream": True}).text
    assert ": keep-alive\ndata: " in text and ": keep-alive\n\n" not in text
    assert "\nid:" not in text
    script = [ContentDelta("He"), RuntimeError("no")]
    with Server(ScriptedBackend(script)) as server:
        text = server.post({"messages": HELLO, "stream": True}).text
        assert '"error"' in text.split("\n\n")[-2] and "[DONE]" not in text
        body = {"model": "x", "max_tokens": 9, "messages": HELLO, "stream": True}
        assert "event: error\n" in server.post(body, "/v1/messages").text
        body = {"model": "x", "input": "a", "stream": True}
        assert "event: response.failed\n" in server.post(body, "/v1/responses").text


def test_20_each_api_counts_tokens_as_its_clients_do() -> None:
    usage = Usage(100, 20, 64, 5)
    with Server(ScriptedBackend([ContentDelta("x"), Finish("stop", usage)])) as server:
        counts = chat(server)["usage"]
        assert (counts["prompt_tokens"], counts["prompt_tokens_details"]) == (
            100, {"cached_tokens": 64},
        )  # fmt: skip
        assert counts["prompt_cache_hit_tokens"] + counts["prompt_cache_miss_tokens"] == 100
        counts = messages_api(server)["usage"]
        assert (counts["input_tokens"], counts["cache_read_input_tokens"]) == (36, 64)
        counts = server.post({"model": "x", "input": "a"}, "/v1/responses").json()["usage"]
        assert counts["input_tokens"] == 100
        assert counts["input_tokens_details"]["cached_tokens"] == 64


def test_21_a_developer_message_is_taken_anywhere(say: Say) -> None:
    developer = {"role": "developer", "content": "Be brief"}
    chat(say("a</think>b"), [developer, *HELLO])
    assert prompt(say("")).index("Be brief") < prompt(say("")).index(USER)
    chat(say("a</think>b"), [*HELLO, developer])
    assert prompt(say("")).index("Be brief") > prompt(say("")).index(USER)


def test_22_orphan_missing_and_reordered_results_are_repaired(say: Say) -> None:
    def call(name: str) -> dict[str, Any]:
        function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
        return {"id": name, "type": "function", "function": function}

    turn = {"role": "assistant", "content": "", "tool_calls": [call("a"), call("b")]}

    def back(name: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": name, "content": f"result {name}"}

    for messages, found in (
        ([*HELLO, turn, back("b"), back("a")], ["result a", "result b"]),
        ([*HELLO, turn, back("b")], ["result b", "[no result]"]),
        ([*HELLO, turn], ["[no result]", "[no result]"]),
        ([back("z"), *HELLO], ["result z"]),
        ([*HELLO, turn, {"role": "user", "content": "stop"}, back("a"), back("b")], ["stop"]),
    ):
        chat(say("a</think>b"), messages, tools=[WEATHER])
        text = prompt(say(""))
        assert all(f in text for f in found)
    assert prompt(say("")).count("[no result]") <= 2


def test_23_the_cache_helps_short_prompts_and_says_the_truth(say: Say) -> None:
    chat(say("a</think>b"), [{"role": "user", "content": "days"}])
    usage = chat(say("a</think>b"), [{"role": "user", "content": "days"}])["usage"]
    assert usage["prompt_cache_miss_tokens"] == 1
    history: list[Any] = [{"role": "user", "content": "Paris?"}]
    message = said(chat(say("So.</think>Yes."), history, tools=[WEATHER]))
    history += [message, {"role": "user", "content": "And?"}]
    usage = chat(say("So.</think>Yes."), history, tools=[WEATHER])["usage"]
    assert usage["prompt_cache_miss_tokens"] < 15, "the end of the answer was kept"
    other = chat(say("a</think>b"), history, tools=[WEATHER], reasoning_effort="max")["usage"]
    assert other["prompt_cache_miss_tokens"] > 100, "another effort is another prompt"


@pytest.mark.parametrize("tools", [[], [WEATHER]])
def test_24_reasoning_is_told_apart_with_and_without_tools(say: Say, tools: list[Any]) -> None:
    chunks = say("Let me see.</think>Fine.").chunks({"messages": HELLO, "tools": tools})
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content") or "" for d in deltas) == "Fine."
    assert "".join(d.get("reasoning_content") or "" for d in deltas) == "Let me see."
    kinds = ["r" if d.get("reasoning_content") else "c" for d in deltas[1:-1]]
    assert all(not (a == "c" and b == "r") for a, b in pairwise(kinds))


def test_25_temperature_zero_while_thinking_can_be_ignored() -> None:
    backend = ScriptedBackend([ContentDelta("x"), Finish("stop", Usage(1, 1))])
    with Server(backend, official_sampling=True) as server:
        chat(server, temperature=0, top_p=0.5)
        messages_api(server, temperature=0)
        server.post({"model": "x", "input": "a", "temperature": 0}, "/v1/responses")
        chat(server, temperature=0, **OFF)
    temperatures = [r.sampling.temperature for r in backend.requests]
    assert temperatures == [1.0, 1.0, 1.0, 0]

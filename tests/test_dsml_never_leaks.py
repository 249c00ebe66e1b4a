"""Tool markup becomes calls or stays text, whole, and however the text arrives in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.encoding import (
    BOS,
    DSML,
    EOS,
    SPECIAL_TOKENS,
    Completion,
    ContentDelta,
    Event,
    ReasoningDelta,
    StreamingParser,
    ToolCall,
    encode_messages,
    generation_mode,
    normalize_messages,
    parse_completion,
    random_call_id,
)

VECTORS = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "encoding"


def tool(name: str, required: list[str], **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool(
        "search",
        ["q"],
        q={"type": "string"},
        n={"type": "integer"},
        deep={"type": "boolean"},
        tags={"type": "array", "items": {"type": "string"}},
        where={"anyOf": [{"type": "object"}, {"type": "null"}]},
        any={},
    ),
    tool("get_time", []),
]
P_Q = f'<{DSML}parameter name="q" string="true">cats</{DSML}parameter>\n'
INVOKE = f'<{DSML}invoke name="search">\n{P_Q}</{DSML}invoke>\n'
OPEN, CLOSE = f"<{DSML}tool_calls>\n", f"</{DSML}tool_calls>"
BLOCK = OPEN + INVOKE + CLOSE
CATS = ("search", {"q": "cats"})


def run(
    pieces: str | list[str],
    mode: str = "chat",
    tools: Any = TOOLS,
    reason: str = "stop",
    tool_choice: Any = "auto",
) -> tuple[list[Event], Completion]:
    """All events, neighbouring deltas joined, and the completion."""
    parser = StreamingParser(mode, tools, tool_choice, make_id=lambda n: f"id{n}")
    events: list[Event] = []
    for piece in [pieces] if isinstance(pieces, str) else pieces:
        events += parser.feed(piece)
    completion = parser.finish(reason)
    joined: list[Event] = []
    for event in events + completion.events:
        last = joined[-1] if joined else None
        if isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            joined[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            joined[-1] = ReasoningDelta(last.text + event.text)
        else:
            joined.append(event)
    return joined, completion


def calls(completion: Completion) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in completion.message["tool_calls"]]
    return [(f["name"], json.loads(f["arguments"])) for f in functions]


def check_consistent(text: str, mode: str, tools: Any = TOOLS, reason: str = "stop") -> None:
    """Events add up to the message, and every way of cutting the text gives the same ones."""
    expected = run(text, mode, tools, reason)
    events, completion = expected
    message = completion.message
    assert message["content"] == "".join(e.text for e in events if isinstance(e, ContentDelta))
    assert message["reasoning_content"] == "".join(
        e.text for e in events if isinstance(e, ReasoningDelta)
    )
    assert [c["id"] for c in message["tool_calls"]] == [
        e.id for e in events if isinstance(e, ToolCall)
    ]
    assert run(list(text), mode, tools, reason) == expected
    for cut in range(len(text) + 1):
        assert run([text[:cut], text[cut:]], mode, tools, reason) == expected


# -------------------------------------------------------------- well-formed completions


def test_content_and_call() -> None:
    events, completion = run(f"Let me look.\n\n{BLOCK}{EOS}")
    assert events == [
        ContentDelta("Let me look."),
        ToolCall(0, "id0", "search", '{"q": "cats"}'),
    ]
    assert completion.finish_reason == "tool_calls"
    assert completion.message == {
        "role": "assistant",
        "content": "Let me look.",
        "reasoning_content": "",
        "tool_calls": [
            {
                "id": "id0",
                "type": "function",
                "function": {"name": "search", "arguments": '{"q": "cats"}'},
            }
        ],
    }


def test_reasoning_content_and_calls() -> None:
    text = f"Hm <b>.\n\n</think>So:\n\n{OPEN}{INVOKE}{INVOKE}{CLOSE}"
    events, completion = run(text, "thinking")
    assert events[:2] == [ReasoningDelta("Hm <b>.\n\n"), ContentDelta("So:")]
    assert calls(completion) == [CATS, CATS]


def test_a_call_is_published_as_soon_as_its_invoke_closes() -> None:
    parser = StreamingParser("chat", TOOLS)
    assert parser.feed("\n\n" + OPEN + INVOKE.rstrip()[:-1]) == []
    (event,) = parser.feed(">")
    assert isinstance(event, ToolCall)


def test_text_is_not_held_back_without_need() -> None:
    parser = StreamingParser("thinking", TOOLS)
    assert parser.feed("a < b, ") == [ReasoningDelta("a < b,")]
    assert parser.feed("2 <") == [ReasoningDelta(" 2")]
    assert parser.feed(" 3") == [ReasoningDelta(" < 3")]
    without_tools = StreamingParser("chat")
    assert without_tools.feed("line\n\n<tool") == [ContentDelta("line\n\n<tool")]


def test_what_was_held_back_reaches_the_user_at_the_end() -> None:
    for text in ("2 <", "x\n\n", "a </", "a <in", "<", "\n"):
        for reason in ("stop", "length"):
            _, completion = run(text, reason=reason)
            assert completion.message["content"] == text
            assert completion.finish_reason == reason


@pytest.mark.skipif(not VECTORS.is_dir(), reason=f"the conformance vectors are not at {VECTORS}")
def test_what_the_official_parser_accepts_means_the_same_to_both() -> None:
    with open(VECTORS / "completions.jsonl", encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    for case in cases:
        expected = case.get("ok")
        if expected is None:
            continue
        message = parse_completion(case["completion"], case["thinking_mode"])
        assert message["content"] == expected["content"]
        assert message["reasoning_content"] == expected["reasoning_content"]
        pairs = zip(message["tool_calls"], expected["tool_calls"], strict=True)
        for ours, theirs in pairs:
            assert ours["function"]["name"] == theirs["function"]["name"]
            arguments = theirs["function"]["arguments"]
            try:
                json.loads(arguments)
            except ValueError:  # the official parser pastes JSON unseen
                assert isinstance(json.loads(ours["function"]["arguments"]), dict)
            else:
                assert ours["function"]["arguments"] == arguments


def test_what_is_rendered_is_parsed_back() -> None:
    arguments = {"q": 'a "b" </think> <x> \n\n<｜DSML｜invoke', "n": 3, "where": {"k": [1.5, None]}}
    assistant = {
        "role": "assistant",
        "reasoning_content": "why\n",
        "content": "text\n",
        "tool_calls": [{"function": {"name": "search", "arguments": json.dumps(arguments)}}],
    }
    history = [{"role": "user", "content": "u"}]
    prompt = encode_messages(history, "thinking")
    completion = encode_messages([*history, assistant], "thinking").removeprefix(prompt)
    _, parsed = run(completion, generation_mode(prompt))
    assert calls(parsed) == [("search", arguments)]
    assert (parsed.message["reasoning_content"], parsed.message["content"]) == ("why\n", "text\n")
    check_consistent(completion, "thinking")


# -------------------------------------------------------------- malformed, but plain in meaning

NAMED = f'<{DSML}invoke name="search">'
JSON = '{"q": "cats"}'
JSON_CALL = '{"name": "search", "arguments": {"q": "cats"}}'
VALUE = '"q" string="true">cats'

RECOVERED = {
    "no wrapper": INVOKE,
    "no closing wrapper": OPEN + INVOKE,
    "no opening wrapper": INVOKE + CLOSE,
    "no final closers": OPEN + INVOKE.replace(f"</{DSML}invoke>\n", ""),
    "half a final closer": OPEN + INVOKE.removesuffix("oke>\n"),
    "invoke closed by the block": OPEN + INVOKE.replace(f"</{DSML}invoke>\n", "") + CLOSE,
    "toolcalls": BLOCK.replace("tool_calls", "toolcalls"),
    "tool_call": BLOCK.replace("tool_calls", "tool_call"),
    "function_calls": BLOCK.replace("tool_calls", "function_calls"),
    "two names": BLOCK.replace("<｜DSML｜tool_calls", "<｜DSML｜function_calls"),
    "ASCII bars": BLOCK.replace("｜", "|"),
    "mixed bars": BLOCK.replace("DSML｜", "DSML|"),
    "no first bar": BLOCK.replace("｜DSML", "DSML"),
    "no second bar": BLOCK.replace("DSML｜", "DSML"),
    "doubled bars": BLOCK.replace("｜", "｜｜"),
    "lower case": BLOCK.replace("DSML", "dsml"),
    "no DSML": 
    BLOCK.replace(DSML, ""),
    "no newlines": BLOCK.replace("\n", ""),
    "many newlines": BLOCK.replace("\n", "\n \n\t\n"),
    "spaces in tags": BLOCK.replace('">', '" >').replace("</", "</ ").replace("calls>", "calls >"),
    "single quotes": BLOCK.replace('"', "'"),
    "no quotes": BLOCK.replace('"', ""),
    "no string attribute": BLOCK.replace(' string="true"', ""),
    "odd case": BLOCK.replace('string="true"', 'String="True"'),
    "string false on a bare word": BLOCK.replace('"true"', '"false"'),
    "extra attribute": BLOCK.replace('"search"', '"search" id="3"'),
    "name without name=": BLOCK.replace('name="search"', '"search"'),
    "JSON body": f"{OPEN}{NAMED}\n{JSON}\n</{DSML}invoke>\n{CLOSE}",
    "JSON body, loose": f"{NAMED}{{q: 'cats',}}</{DSML}invoke>",
    "fenced JSON body": f"{NAMED}\n```json\n{JSON}\n```\n</{DSML}invoke>",
    "name and fenced JSON": f"<{DSML}invoke>search\n```json\n{JSON}\n```</{DSML}invoke>",
    "name and fenced JSON in the wrapper": f"{OPEN}search\n```json\n{JSON}\n```\n{CLOSE}",
    "whole call as JSON": f"<tool_call>\n{JSON_CALL}\n</tool_call>",
    "arguments as JSON text": f"<tool_call>{JSON_CALL.replace(JSON, json.dumps(JSON))}</tool_call>",
    "JSON without closers": f"{OPEN}{NAMED}\n{JSON}\n",
    "wrapped in arguments": BLOCK.replace(VALUE, f'"arguments" string="false">{JSON}'),
    "wrapped in input, as text": BLOCK.replace(VALUE, f'"input" string="true">{JSON}'),
    "duplicate, last wins": BLOCK.replace(P_Q, P_Q.replace("cats", "dogs") + P_Q),
    "case of the tool": BLOCK.replace('"search"', '"Search"'),
    "namespace": BLOCK.replace('"search"', '"functions.search"'),
    "case of the parameter": BLOCK.replace('"q"', '"Q"'),
    "wrapper twice": OPEN + BLOCK,
    "stray think tags": f"<think></think>{OPEN}<think>{INVOKE}</think>{CLOSE}{BOS}",
    "text after it": f"{BLOCK}\n\nI called the tool.",
    "right after text on the same line": f"{BLOCK}",
}  # fmt: skip


@pytest.mark.parametrize("shape", RECOVERED)
@pytest.mark.parametrize("before", ["", "\n\n", "Let me see.\n\n", "Let me see.\n", "Let me see. "])
def test_recovered(shape: str, before: str) -> None:
    if shape == "text after it":
        before = before.rstrip(" ")
    end = "" if shape == "half a final closer" else EOS
    events, completion = run(before + RECOVERED[shape] + end)
    assert calls(completion) == [CATS]
    assert completion.finish_reason == "tool_calls"
    assert completion.message["content"] == before.strip()
    assert isinstance(events[-1], ToolCall)


@pytest.mark.parametrize("shape", RECOVERED)
def test_recovered_however_it_is_cut(shape: str) -> None:
    check_consistent(f"A.\n\n{RECOVERED[shape]}{EOS}", "chat")


def test_self_closing_invoke() -> None:
    for tag in (f'<{DSML}invoke name="get_time"/>', '<invoke name="get_time" />'):
        _, completion = run(OPEN + tag + "\n" + CLOSE)
        assert calls(completion) == [("get_time", {})]


def test_no_parameters() -> None:
    _, completion = run(f'\n\n{OPEN}<{DSML}invoke name="get_time">\n\n</{DSML}invoke>\n{CLOSE}')
    assert calls(completion) == [("get_time", {})]


def test_several_blocks_become_one_list() -> None:
    events, completion = run(f"A\n\n{BLOCK}\n\nand\n\n{BLOCK}\n{INVOKE}{EOS}more")
    assert calls(completion) == [CATS] * 3
    assert [c["id"] for c in completion.message["tool_calls"]] == ["id0", "id1", "id2"]
    assert events[0] == ContentDelta("A")


def test_an_empty_block_is_no_call_and_no_text() -> None:
    _, completion = run(f"A\n\n{OPEN}{CLOSE}{EOS}")
    assert completion.message["content"] == "A"
    assert completion.finish_reason == "stop"


# -------------------------------------------------------------- types


def argument(name: str, text: str, asks: str | None) -> Any:
    attribute = "" if asks is None else f' string="{asks}"'
    parameter = f'<{DSML}parameter name="{name}"{attribute}>{text}</{DSML}parameter>\n'
    _, completion = run(BLOCK.replace(P_Q, P_Q + parameter))
    ((_, arguments),) = calls(completion)
    return arguments[name]


@pytest.mark.parametrize(
    ("name", "text", "asks", "expected"),
    [
        ("q", "5", "true", "5"),
        ("q", "5", "false", "5"),
        ("q", '"5"', "false", "5"),
        ("q", " a\n", "true", " a\n"),
        ("q", '{"a": 1}', "false", '{"a": 1}'),
        ("q", "", "true", ""),
        ("q", "5", None, "5"),
        ("n", "5", "true", 5),
        ("n", "5", "false", 5),
        ("n", '"5"', "false", 5),
        ("n", "5", None, 5),
        ("n", "five", "true", "five"),
        ("n", "five", "false", "five"),
        ("n", "", "false", ""),
        ("n", "NaN", "false", "NaN"),
        ("n", "1e999", "false", "1e999"),
        ("deep", "True", "true", True),
        ("deep", "false", None, False),
        ("tags", '["a"]', "true", ["a"]),
        ("tags", "['it\\'s \"x\"', True, None,]", "false", ['it\'s "x"', True, None]),
        ("tags", "[a, b c]", "false", ["a", "b c"]),
        ("tags", '["a"', "false", '["a"'),
        ("where", "{a: {b: 1,},}", "false", {"a": {"b": 1}}),
        ("where", "null", "true", None),
        ("where", '{"a": "line\nbreak"}', "false", {"a": "line\nbreak"}),
        ("any", "5", "true", "5"),
        ("any", "5", "false", 5),
        ("any", "5", None, 5),
        ("any", "five", None, "five"),
        ("any", "[" * 100_000, "false", "[" * 100_000),
        ("unknown", "x </b> y", "true", "x </b> y"),
    ],
)
def test_types(name: str, text: str, asks: str | None, expected: Any) -> None:
    value = argument(name, text, asks)
    assert value == expected
    assert type(value) is type(expected)


def test_json_is_kept_as_the_model_wrote_it() -> None:
    text = BLOCK.replace(P_Q, P_Q + f'<{DSML}parameter name="any" string="false">'
                         f'{{"a":1.50,  "b":1e5}}</{DSML}parameter>\n')  # fmt: skip
    _, completion = run(text)
    arguments = completion.message["tool_calls"][0]["function"]["arguments"]
    assert arguments == '{"q": "cats", "any": {"a":1.50,  "b":1e5}}'


# -------------------------------------------------------------- gates

REFUSED = {
    "name not declared": BLOCK.replace("search", "delete_all"),
    "required argument missing": BLOCK.replace('"q"', '"n"'),
    "invoke not closed": OPEN + f'<{DSML}invoke name="search">\n' + P_Q[:-20],
    "no argument at all": f'{OPEN}<{DSML}invoke name="search">\n',
    "unclosed, though nothing is required": f'{OPEN}<{DSML}invoke name="get_time">\n',
    "opener alone": OPEN,
    "prose in the block": f"{OPEN}goes here, then{CLOSE}",
    "JSON that is none": f'<{DSML}invoke name="search">{{"q": </{DSML}invoke>',
    "in a code fence": f"```xml\n{BLOCK}\n```\n",
    "in a tilde fence": f"~~~\n{BLOCK}\n~~~",
    "in a code span": f"write `{INVOKE.strip()}` so",
    "in quotation marks": f'write "{BLOCK}" so',
    "in a quotation": f"> {BLOCK}",
    "within a sentence": f"write {INVOKE.strip()} and it runs",
    "mentioned": f"The <{DSML}tool_calls> tag comes first, then <{DSML}invoke name=.",
    "closers alone": f"</{DSML}invoke>{CLOSE}",
}


@pytest.mark.parametrize("shape", REFUSED)
def test_refused_markup_stays_text_whole(shape: str) -> None:
    text = f"A.\n\n{REFUSED[shape]}"
    _, completion = run(text + EOS)
    assert calls(completion) == []
    assert completion.finish_reason == "stop"
    assert completion.message["content"] == text
    check_consistent(text, "chat")
    check_consistent(text, "chat", reason="length")


def test_two_tools_that_differ_only_in_case_are_not_confused() -> None:
    tools = [tool("Search", []), tool("SEARCH", [])]
    _, completion = run(BLOCK, tools=tools)
    assert calls(completion) == []
    _, completion = run(BLOCK.replace("search", "SEARCH"), tools=tools)
    assert calls(completion) == [("SEARCH", {"q": "cats"})]


@pytest.mark.parametrize(
    ("tools", "choice"), [(None, "auto"), ([], "auto"), (TOOLS, "none"), (TOOLS, {"type": "none"})]
)
def test_without_tools_markup_is_never_parsed(tools: Any, choice: Any) -> None:
    text = f"why</think>A.\n\n{BLOCK}\n"
    _, completion = run(text + EOS, "thinking", tools, tool_choice=choice)
    assert completion.message["reasoning_content"] == "why"
    assert completion.message["content"] == f"A.\n\n{BLOCK}\n"
    assert completion.message["tool_calls"] == []


def test_a_good_call_next_to_a_refused_one_is_made() -> None:
    refused = INVOKE.replace("search", "nothing")
    _, completion = run(f"A\n\n{OPEN}{INVOKE}{refused}{CLOSE}")
    assert calls(completion) == [CATS]
    assert completion.message["content"] == "A"
    _, completion = run(f"A\n\n{OPEN}{refused}{INVOKE}{CLOSE}")
    assert calls(completion) == [CATS]
    assert refused.strip() in completion.message["content"]


def test_markup_inside_a_value_is_the_value() -> None:
    value = f"```\n{OPEN}{INVOKE.replace(P_Q, '')}{CLOSE}</think>{EOS}</parameter></invoke>"
    _, completion = run(BLOCK.replace("cats", value) + EOS)
    assert calls(completion) == [("search", {"q": value})]


# -------------------------------------------------------------- truncation


@pytest.mark.parametrize("mode", ["chat", "thinking"])
def test_a_call_that_is_cut_off_is_neither_made_nor_shown(mode: str) -> None:
    head = "why</think>" if mode == "thinking" else ""
    text = f"{head}Let me look.\n\n{BLOCK}"
    invoke_ends = text.index(f"</{DSML}invoke>") + len(f"</{DSML}invoke>")
    for cut in range(len(head), len(text)):
        _, completion = run(text[:cut], mode, reason="length")
        assert completion.finish_reason == "length"
        assert len(completion.message["tool_calls"]) == (cut >= invoke_ends)
        assert "Let me look.\n\n".startswith(completion.message["content"].rstrip("<"))


# -------------------------------------------------------------- reasoning


def test_reasoning_is_split_with_and_without_tools() -> None:
    for tools in (None, TOOLS):
        _, completion = run("<think>why</think>yes</think> no<think>", "thinking", tools)
        assert completion.message["reasoning_content"] == "why"
        assert completion.message["content"] == "yes no"


@pytest.mark.parametrize("after", ["", "\n", EOS, "</think>", "\n</think>\n\n" + EOS])
def test_a_call_that_ends_the_reasoning_is_made(after: str) -> None:
    events, completion = run(f"I will call.\n\n{BLOCK}{after}", "thinking")
    assert calls(completion) == [CATS]
    assert events[0] == ReasoningDelta("I will call.")
    assert completion.message["content"] == ""
    check_consistent(f"I will call.\n\n{BLOCK}{after}", "thinking")


@pytest.mark.parametrize("shape", sorted(RECOVERED.keys() - {"text after it", "stray think tags"}))
def test_a_call_in_reasoning_that_goes_on_is_reasoning(shape: str) -> None:
    text = f"Perhaps\n\n{RECOVERED[shape]}"
    _, completion = run(f"{text} or not.</think>No.", "thinking")
    assert calls(completion) == []
    assert completion.message["content"] == "No."
    assert completion.message["reasoning_content"].endswith(" or not.")
    _, completion = run(f"{text}</think>Yes.\n\n{BLOCK}", "thinking")
    assert calls(completion) == [CATS]
    assert completion.message["content"] == "Yes."


def test_an_unclosed_tag_in_reasoning_does_not_swallow_the_answer() -> None:
    for opened in (OPEN, OPEN + INVOKE[:30], OPEN + INVOKE[:90], f'<{DSML}invoke name="search">{{'):
        text = f"Hm.\n\n{opened}</think>Yes.\n\n{BLOCK}"
        _, completion = run(text, "thinking")
        assert completion.message["reasoning_content"] == f"Hm.\n\n{opened}"
        assert completion.message["content"] == "Yes."
        assert calls(completion) == [CATS]
        check_consistent(text, "thinking")


# -------------------------------------------------------------- anything at all

FRAGMENTS = [
    "<", ">", "/", "｜", "|", '"', "'", "`", "```\n", "\n", "\n\n", " ", "a", "2 < 3", "cats",
    "{", "}", '{"q": "cats"}', "DSML", DSML, OPEN, CLOSE, INVOKE, P_Q, BLOCK, 
    BLOCK.replace(DSML, ""),
    f'<{DSML}invoke name="search">', '<invoke name="get_time"/>', f"</{DSML}invoke>",
    f'<{DSML}parameter name="q" string="true">', f"</{DSML}parameter>", "</parameter>",
    "<tool_call>",
    *SPECIAL_TOKENS,
]  # fmt: skip
completions = st.lists(
    st.sampled_from(FRAGMENTS) | st.text(max_size=5), min_size=1, max_size=14
).map("".join)


@given(
    text=completions,
    mode=st.sampled_from(["chat", "thinking"]),
    tools=st.sampled_from([TOOLS, None, "any"]),
    reason=st.sampled_from(["stop", "length"]),
    data=st.data(),
)
def test_any_text_in_any_pieces(text: str, mode: str, tools: Any, reason: str, data: Any) -> None:
    expected = run(text, mode, tools, reason)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(pieces, mode, tools, reason) == expected
    assert run(list(text), mode, tools, reason) == expected
    message = expected[1].message
    for call in message["tool_calls"]:
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
        assert tools == "any" or call["function"]["name"] in ("search", "get_time")
    shown = message["content"] + message["reasoning_content"]
    assert not any(token in shown for token in SPECIAL_TOKENS if token.startswith("<"))


@given(text=st.text() | completions)
def test_plain_text_is_never_lost(text: str) -> None:
    plain = text.replace("<", "(")
    for tools in (None, TOOLS):
        assert run(plain, "chat", tools)[1].message["content"] == plain
        assert run(plain, "thinking", tools)[1].message["reasoning_content"] == plain


def test_long_arguments_take_linear_time() -> None:
    value = "x <b> = y > z;\n" * 20_000
    _, completion = run(BLOCK.replace("cats", value))
    assert calls(completion) == [("search", {"q": value})]


def test_call_ids() -> None:
    first, second = random_call_id(0), random_call_id(12)
    assert first.startswith("call_00_") and second.startswith("call_12_")
    assert len(first.removeprefix("call_00_")) == 24 and first[8:].isalnum()
    assert random_call_id(0) != first


# -------------------------------------------------------------- messages from anywhere


def ready(messages: list[Any], mode: str = "thinking", tools: Any = None) -> str:
    return encode_messages(normalize_messages(messages, tools), mode)


def test_system_text_anywhere_leaves_a_prompt_ready_for_generation() -> None:
    assert ready([{"role": "system", "content": "s"}]).endswith("s<｜User｜><｜Assistant｜><think>")
    prompt = ready([{"role": "user", "content": "u"}, {"role": "system", "content": "s"}])
    assert prompt.endswith("<｜User｜>u\n\ns<｜Assistant｜><think>")
    prompt = ready(
        [
            {"role": "developer", "content": "d"},
            {"role": "user", "content": "u"},
            {"role": "system", "content": "s"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "v"},
        ],
        "chat",
    )
    assert prompt == (
        f"{BOS}d<｜User｜>u\n\ns<｜Assistant｜></think>a{EOS}<｜User｜>v<｜Assistant｜></think>"
    )


def test_tools_given_beside_the_messages_go_to_the_head() -> None:
    bare = TOOLS[1]["function"]
    prompt = ready([{"role": "user", "content": "u", "tools": TOOLS[:1]}], tools=[bare])
    assert prompt.startswith(f"{BOS}\n\n## Tools")
    assert '{"name": "search"' in prompt and '{"name": "get_time"' in prompt


def test_tool_results_are_repaired() -> None:
    def call(call_id: str) -> dict[str, Any]:
        return {"id": call_id, "function": {"name": "f", "arguments": {"a": 1}}}

    prompt = ready(
        [
            {"role": "assistant", "tool_calls": [call("1")]},
            {"role": "user", "content": "never mind"},
        ]
    )
    assert "<tool_result>[no result]</tool_result>\n\nnever mind<｜Assistant｜>" in prompt
    prompt = ready(
        [
            {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "image_url"}]},
            {"role": "assistant", "content": None, "tool_calls": [call("1"), call("2")]},
            {"role": "tool", "tool_call_id": "2", "content": None},
            {"role": "tool", "tool_call_id": "gone", "content": "orphan"},
            {"role": "assistant", "content": "a"},
            {"role": "assistant", "content": "b", "tool_calls": [call("3")]},
        ],
        "chat",
    )
    assert "<｜User｜>u\n\n[Unsupported image_url]<｜Assistant｜>" in prompt
    assert (
        "<tool_result>[no result]</tool_result>\n\n<tool_result></tool_result>\n\norphan" in prompt
    )
    assert "</think>a\n\nb\n\n<｜DSML｜tool_calls>" in prompt
    assert prompt.endswith(
        "<｜User｜><tool_result>[no result]</tool_result><｜Assistant｜></think>"
    )


def test_an_assistant_message_at_the_end_is_continued() -> None:
    user = {"role": "user", "content": "u"}
    assistant = {"role": "assistant", "content": "Once upon", "prefix": True}
    prompt = ready([user, assistant])
    assert prompt.endswith("<think></think>Once upon")
    assert generation_mode(prompt) == "chat"
    prompt = ready([user, {"role": "assistant", "reasoning_content": "Let", "prefix": True}])
    assert prompt.endswith("<｜Assistant｜><think>Let")
    assert generation_mode(prompt) == "thinking"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda v: st.lists(v, max_size=2)
    | st.dictionaries(st.sampled_from(["type", "text", "id", "function", "name", "arguments"]), v),
    max_leaves=5,
)  # fmt: skip
roles = ["system", "developer", "user", "assistant", "tool", "latest_reminder", "function", "x"]
any_message = st.fixed_dictionaries(
    {"role": st.sampled_from(roles)},
    optional={
        "content": json_values,
        "reasoning_content": json_values,
        "tool_calls": json_values
        | st.lists(
            st.fixed_dictionaries(
                {
                    "id": st.sampled_from(["1", "2", None]),
                    "function": st.fixed_dictionaries(
                        {"name": json_values, "arguments": json_values}
                    ),
                }
            ),
            max_size=2,
        ),
        "tool_call_id": st.sampled_from(["1", "2", None, 3]),
        "task": st.sampled_from(["query", "nonsense"]),
        "prefix": st.booleans(),
    },
)


@given(
    messages=st.lists(any_message | json_values, max_size=6),
    mode=st.sampled_from(["chat", "thinking"]),
)
def test_any_messages_give_a_prompt_ready_for_generation(messages: list[Any], mode: str) -> None:
    normal = normalize_messages(messages, TOOLS)
    prompt = encode_messages(normal, mode)
    prompt.encode()
    last = normal[-1]
    if any("task" in m for m in normal):
        return
    if last["role"] == "assistant":
        assert prompt.endswith(last["content"]) and not prompt.endswith(EOS)
    else:
        assert prompt.endswith(
            "<｜Assistant｜>" + ("<think>" if mode == "thinking" else "</think>")
        )

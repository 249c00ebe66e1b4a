"""Messages to prompt text; the way back, completion to message, is in ``completion``.

    messages --encode_messages--> prompt text --model--> completion --parse_completion--> message

* ``encode_messages`` follows the official April 2026 prompt encoder byte for byte.
  ``encode_segments`` gives the same text in pieces that say which parts may become special
  tokens: what the template wrote may, what a caller or a tool supplied never does.
* ``normalize_messages`` turns whatever clients send into messages the official rules can render.
* ``parse_completion`` and ``StreamingParser`` are importable from here, as the inverse direction.

A message is a plain dict in the OpenAI shape: ``role``, ``content``, ``reasoning_content``,
``tool_calls``, ``tool_call_id``; and, as in the official encoder, ``tools`` and
``response_format`` on a system or developer message, ``task``, ``wo_eos`` on any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from .completion import (
    Completion,
    ContentDelta,
    Event,
    Message,
    ReasoningDelta,
    StreamingParser,
    ToolCall,
    parse_completion,
    random_call_id,
)
from .errors import EncodingError
from .special_tokens import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    EXTRACTED_URL,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    LATEST_REMINDER,
    PAD,
    SPECIAL_TOKENS,
    TASKS,
    THINK,
    USER,
)

__all__ = [
    "ASSISTANT",
    "BOS",
    "DSML",
    "EFFORTS",
    "END_THINK",
    "EOS",
    "EXTRACTED_URL",
    "FIM_BEGIN",
    "FIM_END",
    "FIM_HOLE",
    "LATEST_REMINDER",
    "MAX_EFFORT",
    "PAD",
    "SPECIAL_TOKENS",
    "TASKS",
    "THINK",
    "USER",
    "Completion",
    "ContentDelta",
    "Event",
    "Message",
    "ReasoningDelta",
    "Segment",
    "StreamingParser",
    "ToolCall",
    "Written",
    "encode_messages",
    "encode_segments",
    "generation_mode",
    "normalize_messages",
    "parse_completion",
    "random_call_id",
]

Segment = tuple[str, bool]


class Written(str):
    """Text a model wrote, with the tokens it wrote it in.

    In place of a message's ``reasoning_content``, or of its content and calls together (as
    ``written``), it goes into a prompt as those very tokens, never tokenized again.
    """

    ids: Sequence[int]

    def __new__(cls, text: str, ids: Sequence[int]) -> Written:
        self = super().__new__(cls, text)
        self.ids = ids
        return self



EFFORTS: dict[str, tuple[str, str | None]] = {
    "off": ("chat", None),
    "high": ("thinking", "high"),
    "max": ("thinking", "max"),
}
"""Public effort -> (``thinking_mode``, ``reasoning_effort``) of the April 2026 weights."""

MAX_EFFORT = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve \
the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and \
adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, \
considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""  # noqa: E501

_TOOLS_INTRO = f"""\


## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, \
booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside \
{THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_OUTRO = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke "
    "tool calls.\n"
)
_FORMAT_INTRO = (
    "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)


# ------------------------------------------------------------------ messages -> prompt text


def encode_messages(
    messages: Sequence[Message],
    thinking_mode: str,
    context: Sequence[Message] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
) -> str:
    """Prompt text of ``messages``, byte for byte as the official encoder renders it.

    ``thinking_mode`` is "chat" or "thinking"; ``reasoning_effort`` None, "high" or "max" (only
    "max" in thinking mode changes the text). ``context`` holds messages whose text the caller
    already has: only what follows it is returned, without BOS. ``drop_thinking`` leaves out the
    reasoning before the last user turn; any message with ``tools`` switches that off. The
    prompt ends ready for generation when the last message is a user's or a tool's.

    One departure: with ``context``, the official code miscounts when dropping removes a
    developer message from it and can lose new messages. Here none is lost.

    Raises EncodingError for messages that have no official rendering; ``normalize_messages``
    makes such messages renderable. Source: encoding_dsv4.py of the official checkpoints.
    """
    segments = encode_segments(
        messages, thinking_mode, context, drop_thinking, add_default_bos_token, reasoning_effort
    )
    return "".join(text for text, _ in segments)


def encode_segments(
    messages: Sequence[Message],
    thinking_mode: str,
    context: Sequence[Message] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
) -> list[Segment]:
    """``encode_messages`` as (text, allow_special) pieces, whose texts join to the same prompt.

    ``allow_special`` is True only for text the template itself writes. User, system and tool
    text, tool schemas and the assistant's own words are False, so that a special token's
    spelling inside them can be tokenized as plain text (``Tokenizer.encode_segments``).
    """
    if thinking_mode not in ("chat", "thinking"):
        raise EncodingError(
            "unknown thinking_mode", expected="'chat' or 'thinking'", got=repr(thinking_mode)
        )
    if reasoning_effort not in (None, "high", "max"):
        raise EncodingError(
            "unknown reasoning_effort",
            expected="None, 'high' or 'max'",
            got=repr(reasoning_effort),
            hint="dsv4.encoding.EFFORTS maps the public names, 'off' among them",
        )
    before = _merge_turns(context or [])
    everything = [*before, *_merge_turns(messages)]
    _sort_tool_results(everything)
    if any(m.get("tools") for m in everything):
        drop_thinking = False

    # (message, is it new?): dropping may remove messages from either part.
    rendered = [(m, i >= len(before)) for i, m in enumerate(everything)]
    if thinking_mode == "thinking" and drop_thinking:
        rendered = _drop_reasoning(rendered)
    turns = _Turns([m for m, _ in rendered], thinking_mode == "thinking", drop_thinking)

    out = _Segments()
    if not before and add_default_bos_token:
        out.template(BOS)
    for i, (_, is_new) in enumerate(rendered):
        if is_new:
            if i == 0 and turns.thinking and reasoning_effort == "max":
                out.template(MAX_EFFORT)
            _render_message(out, turns, i)
    return out.pieces


class _Segments:
    """Collects (text, allow_special) pieces; neighbours of one kind become one piece."""

    def __init__(self) -> None:
        self.pieces: list[Segment] = []

    def template(self, text: str) -> None:
        self._add(text, True)

    def plain(self, text: object) -> None:
        if not isinstance(text, str):
            raise EncodingError(
                "message content has no official rendering",
                expected="a string",
                got=type(text).__name__,
                hint="pass the messages through dsv4.encoding.normalize_messages first",
            )
        self._add(text, False)

    def _add(self, text: str, allow_special: bool) -> None:
        if not text:
            return
        last, its_kind = self.pieces[-1] if self.pieces else ("", None)
        written = isinstance(text, Written) or isinstance(last, Written)
        if its_kind == allow_special and not written:
            self.pieces[-1] = (self.pieces[-1][0] + text, allow_special)
        else:
            self.pieces.append((text, allow_special))


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _merge_turns(messages: Sequence[Message]) -> list[Message]:
    """Folds tool results and neighbouring user messages into single user turns of blocks."""
    turns: list[Message] = []
    for message in messages:
        role = message.get("role")
        last = turns[-1] if turns and turns[-1].get("role") == "user" else None
        if role == "tool":
            block = {
                "type": "tool_result",
                "id": message.get("tool_call_id"),
                "content": message.get("content", ""),
            }
            if last is not None:
                last["blocks"].append(block)
            else:
                turns.append({"role": "user", "blocks": [block]})
        elif role == "user":
            block = {"type": "text", "content": message.get("content", "")}
            if last is not None and last.get("task") is None:
                last["blocks"].append(block)
            else:
                kept: Message = {
                    k: v for k, v in message.items() if k in ("task", "wo_eos", "mask")
                }
                turns.append({"role": "user", "blocks": [block], **kept})
        else:
            turns.append(dict(message))
    return turns


def _sort_tool_results(turns: list[Message]) -> None:
    """Puts the results within each user turn into the order their calls were made in."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn.get("role") == "assistant" and turn.get("tool_calls"):
            order = {}
            for i, call in enumerate(turn["tool_calls"]):
                call_id = call.get("id") or call.get("function", {}).get("id")
                if call_id:
                    order[call_id] = i
        elif turn.get("role") == "user" and order:
            blocks = turn["blocks"]
            slots = [i for i, block in enumerate(blocks) if block["type"] == "tool_result"]
            results = sorted((blocks[i] for i in slots), key=lambda b: order.get(b["id"], 0))
            for i, block in zip(slots, results, strict=True):
                blocks[i] = block


def _last_user(messages: Sequence[Message]) -> int:
    users = [i for i, m in enumerate(messages) if m.get("role") in ("user", "developer")]
    return users[-1] if users else -1


def _drop_reasoning(turns: list[tuple[Message, bool]]) -> list[tuple[Message, bool]]:
    """Forgets reasoning (and developer messages) before the last user turn."""
    last_user = _last_user([m for m, _ in turns])
    kept = []
    for i, (message, is_new) in enumerate(turns):
        role = message.get("role")
        always = ("user", "system", "tool", "latest_reminder", "direct_search_results")
        if i >= last_user or role in always:
            kept.append((message, is_new))
        elif role == "assistant":
            kept.append(({k: v for k, v in message.items() if k != "reasoning_content"}, is_new))
    return kept


class _Turns:
    """The merged conversation, and whether the reasoning of a given turn is shown."""

    def __init__(self, turns: list[Message], thinking: bool, drop: bool) -> None:
        self.turns, self.thinking = turns, thinking
        # Reasoning is shown in turns from this index on.
        self.thinks_from = _last_user(turns) if drop else -1

    def think_tag_after(self, i: int) -> str:
        return THINK if self.thinking and i >= self.thinks_from else END_THINK


def _render_message(out: _Segments, conversation: _Turns, i: int) -> None:
    turns = conversation.turns
    message = turns[i]
    role = message.get("role")
    if role == "system":
        out.plain(message.get("content") or "")
        _render_tools_and_format(out, message)
    elif role == "developer":
        if not message.get("content"):
            raise EncodingError(
                "a developer message needs content",
                expected="a non-empty string",
                got=repr(message.get("content")),
            )
        out.template(USER)
        out.plain(message["content"])
        _render_tools_and_format(out, message)
    elif role == "user":
        out.template(USER)
        for n, block in enumerate(message["blocks"]):
            out.template("\n\n" if n else "")
            if block["type"] == "text":
                out.plain(block["content"])
            else:
                out.template("<tool_result>")
                out.plain(_tool_result_text(block["content"]))
                out.template("</tool_result>")
    elif role == "latest_reminder":
        out.template(LATEST_REMINDER)
        out.plain(message.get("content", ""))
    elif role == "assistant":
        _render_assistant(out, conversation, i)
    else:
        raise EncodingError(
            "a message with this role cannot be rendered",
            expected="system, developer, user, assistant, tool or latest_reminder",
            got=repr(role),
        )

    # What leads over to the next turn is written at the end of this one.
    if i + 1 < len(turns) and turns[i + 1].get("role") not in ("assistant", "latest_reminder"):
        return
    task = message.get("task")
    if task is not None:
        if task not in TASKS:
            raise EncodingError("unknown task", expected=", ".join(TASKS), got=repr(task))
        if task == "action":
            out.template(ASSISTANT + (THINK if conversation.thinking else END_THINK))
        out.template(TASKS[task])
    elif role in ("user", "developer"):
        out.template(ASSISTANT + conversation.think_tag_after(i))


def _render_tools_and_format(out: _Segments, message: Message) -> None:
    tools = message.get("tools")
    if tools:
        out.template(_TOOLS_INTRO)
        for n, tool in enumerate(tools):
            if not isinstance(tool, Mapping) or "function" not in tool:
                raise EncodingError(
                    "a tool has no function", expected='{"type": "function", "function": {...}}',
                    got=repr(tool)[:200],
                )  # fmt: skip
            out.template("\n" if n else "")
            out.plain(_dump(tool["function"]))
        out.template(_TOOLS_OUTRO)
    if message.get("response_format"):
        out.template(_FORMAT_INTRO)
        out.plain(_dump(message["response_format"]))


def _tool_result_text(content: object) -> str:
    if isinstance(content, list):
        return "\n\n".join(_part_text(part) for part in content)
    return str(content)


def _part_text(part: object) -> str:
    """Text of one content part; parts that are not text leave the official placeholder."""
    if not isinstance(part, Mapping):
        return str(part)
    if part.get("type") == "text":
        return str(part.get("text", ""))
    return f"[Unsupported {part.get('type')}]"


def _render_assistant(out: _Segments, conversation: _Turns, i: int) -> None:
    message = conversation.turns[i]
    after_task = i > 0 and conversation.turns[i - 1].get("task") is not None
    if conversation.thinking and not after_task and i > conversation.thinks_from:
        out.plain(message.get("reasoning_content") or "")
        if message.get("wo_think_end"):  # ours: the model is to go on thinking from here
            return
        out.template(END_THINK)
    written = message.get("written")
    out.plain(written or message.get("content") or "")
    calls = None if written else message.get("tool_calls")
    if calls:
        out.template(f"\n\n<{DSML}tool_calls>\n")
        for n, call in enumerate(calls):
            out.template("\n" if n else "")
            _render_call(out, call.get("function", call))
        out.template(f"\n</{DSML}tool_calls>")
    if not message.get("wo_eos"):
        out.template(EOS)


def _render_call(out: _Segments, function: Mapping[str, Any]) -> None:
    raw = function.get("arguments")
    try:
        arguments = json.loads(raw)  # type: ignore[arg-type]  # the official code tries anything
    except (TypeError, ValueError):
        arguments = {"arguments": raw}
    if not isinstance(arguments, dict):
        raise EncodingError(
            "tool call arguments are not an object",
            expected="the JSON text of an object",
            got=repr(raw)[:200],
            hint="pass the messages through dsv4.encoding.normalize_messages first",
        )
    out.template(f'<{DSML}invoke name="')
    out.plain(str(function.get("name")))
    out.template('">\n')
    for n, (name, value) in enumerate(arguments.items()):
        is_string = isinstance(value, str)
        out.template(("\n" if n else "") + f'<{DSML}parameter name="')
        out.plain(name)
        out.template(f'" string="{"true" if is_string else "false"}">')
        out.plain(value if is_string else _dump(value))
        out.template(f"</{DSML}parameter>")
    out.template(f"\n</{DSML}invoke>")


def generation_mode(prompt: str) -> str:
    """The ``thinking_mode`` in which to parse what a model writes after ``prompt``.

    "thinking" when the prompt ends inside reasoning, "chat" when the answer has begun already.
    """
    return "thinking" if prompt.rfind(THINK) > prompt.rfind(END_THINK) else "chat"


# ------------------------------------------------------------------ any messages -> renderable


def normalize_messages(
    messages: Sequence[Any], tools: Sequence[Any] | None = None
) -> list[Message]:
    """Messages that ``encode_messages`` can render and that end ready for generation.

    Made for servers: whatever clients send comes out usable, and nothing raises. System text at
    the head stays one system message; later system or developer text stays in its place as user
    text (moving it would change the start of the prompt on every turn). ``tools``, and those on
    any message, go to the head. Content parts become text. A call without a result gets
    "[no result]", a result without a call becomes user text. An assistant message at the end is
    a prefix for the model to continue; if it has only reasoning, the reasoning is continued.
    """
    source = [_clean_message(m) for m in messages]
    all_tools = list(tools or [])
    for message in source:
        all_tools += [t for t in message.pop("tools", None) or [] if t not in all_tools]

    out: list[Message] = []
    head = [m["content"] for m in _leading_system(source) if m["content"]]
    n_head = len(_leading_system(source))
    formats = [m["response_format"] for m in source if m.get("response_format")]
    if head or all_tools or formats:
        out.append({"role": "system", "content": "\n\n".join(head)})
        if all_tools:
            out[0]["tools"] = [t if "function" in t else {"function": t} for t in all_tools]
        if formats:
            out[0]["response_format"] = formats[-1]

    waiting: list[str] = []  # ids of calls that have no result yet
    body = source[n_head:]
    for i, message in enumerate(body):
        role = message["role"]
        after = body[i + 1]["role"] if i + 1 < len(body) else None
        previous: Message = out[-1] if out else {"role": None}
        if role == "assistant":
            _answer_missing(out, waiting)
            previous = out[-1] if out else previous
            if previous["role"] == "assistant":
                _join_assistants(previous, message)
            else:
                if previous["role"] not in ("user", "tool"):
                    out.append({"role": "user", "content": ""})
                out.append(message)
            waiting = [call["id"] for call in out[-1].get("tool_calls", [])]
        elif role == "tool":
            call_id = message.get("tool_call_id") or (waiting[0] if waiting else None)
            if call_id in waiting:
                waiting.remove(call_id)
                out.append({**message, "tool_call_id": call_id})
            else:
                out.append({"role": "user", "content": message["content"]})
        elif role == "latest_reminder" and after == "user" and _ends_a_turn(previous):
            out.append(message)
        elif role == "user":
            out.append(message)
        else:
            out.append({"role": "user", "content": message["content"]})

    last: Message = out[-1] if out else {"role": None}
    if last["role"] == "assistant" and not last.get("tool_calls"):
        last["wo_eos"] = "task" not in last
        if last.get("reasoning_content") and not last["content"]:
            last["wo_think_end"] = True
        return out
    _answer_missing(out, waiting)
    if out[-1:] and out[-1]["role"] in ("user", "tool"):
        return out
    return [*out, {"role": "user", "content": ""}]


_ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


def _clean_message(message: Any) -> Message:
    """One message with a known role, text content, and calls that have ids and arguments."""
    if not isinstance(message, Mapping):
        return {"role": "user", "content": _as_text(message)}
    role = message.get("role")
    role = "tool" if role == "function" else role if role in _ROLES else "user"
    clean: Message = {"role": role, "content": _as_text(message.get("content"))}
    if role in ("system", "developer", "user") and isinstance(message.get("tools"), list):
        clean["tools"] = [t for t in message["tools"] if isinstance(t, Mapping)]
    if message.get("response_format") and role in ("system", "developer"):
        clean["response_format"] = message["response_format"]
    if message.get("task") in TASKS:
        clean["task"] = message["task"]
    if role == "tool":
        clean["tool_call_id"] = _as_text(message.get("tool_call_id"))
    if role == "assistant":
        clean["reasoning_content"] = _as_text(
            message.get("reasoning_content") or message.get("reasoning")
        )
        calls = message.get("tool_calls")
        calls = [c for c in calls if isinstance(c, Mapping)] if isinstance(calls, list) else []
        if calls:
            clean["tool_calls"] = [_clean_call(call, n) for n, call in enumerate(calls)]
    return clean


def _clean_call(call: Mapping[str, Any], index: int) -> Message:
    function = call.get("function")
    function = function if isinstance(function, Mapping) else call
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = "{}"
    elif not isinstance(arguments, str):
        wrapped = arguments if isinstance(arguments, Mapping) else {"arguments": arguments}
        arguments = json.dumps(wrapped, ensure_ascii=False, default=str)
    else:
        arguments = _as_text(arguments)
        try:
            value = json.loads(arguments)
            if not isinstance(value, dict):
                arguments = _dump({"arguments": value})
        except (ValueError, RecursionError):
            pass  # the official encoder keeps such text in one parameter
    return {
        "id": _as_text(call.get("id")) or f"call_{index:02}",
        "type": "function",
        "function": {"name": _as_text(function.get("name")), "arguments": arguments},
    }


def _as_text(content: Any) -> str:
    """Any content as one string that UTF-8 can carry."""
    if content is None:
        return ""
    if isinstance(content, list):
        kinds = ("input_text", "output_text", "refusal")
        parts = [
            {"type": "text", "text": p.get("text", p.get("refusal", ""))}
            if isinstance(p, Mapping) and p.get("type") in kinds
            else p
            for p in content
        ]
        text = "\n\n".join(_part_text(part) for part in parts)
    elif isinstance(content, str):
        text = content
    else:
        text = json.dumps(content, ensure_ascii=False, default=str)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _leading_system(messages: list[Message]) -> list[Message]:
    return list(takewhile(lambda m: m["role"] in ("system", "developer"), messages))


def _answer_missing(out: list[Message], waiting: list[str]) -> None:
    """Adds results for the calls that got none, before what the user said after them."""
    at = len(out)
    while waiting and out[at - 1]["role"] not in ("assistant", "tool"):
        at -= 1
    out[at:at] = [
        {"role": "tool", "tool_call_id": call_id, "content": "[no result]"} for call_id in waiting
    ]


def _ends_a_turn(message: Message) -> bool:
    return message["role"] in (None, "system", "assistant") and not message.get("tool_calls")


def _join_assistants(first: Message, second: Message) -> None:
    """Two assistant messages in a row (the first without calls) become one."""
    for key in ("reasoning_content", "content"):
        first[key] = "\n\n".join(text for text in (first.get(key), second.get(key)) if text)
    first.update({k: second[k] for k in ("tool_calls", "task") if k in second})

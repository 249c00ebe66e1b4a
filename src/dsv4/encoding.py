"""Messages to prompt text, and generated text back to messages.

Both directions live here because they are inverses of each other:

    messages --encode_messages--> prompt text --model--> completion --parse_completion--> message

* ``encode_messages`` follows the official April 2026 prompt encoder byte for byte.
  ``encode_segments`` gives the same text in pieces that say which parts may become special
  tokens: what the template wrote may, what a caller or a tool supplied never does.
* ``normalize_messages`` turns whatever clients send into messages the official rules can render.
* ``parse_completion(strict=True)`` accepts exactly what the official parser accepts.
* ``StreamingParser`` is the tolerant one: text goes in piece by piece, text and tool calls come
  out, the same for every way of cutting the text. ``parse_completion(strict=False)`` uses it.

A message is a plain dict in the OpenAI shape: ``role``, ``content``, ``reasoning_content``,
``tool_calls``, ``tool_call_id``; and, as in the official encoder, ``tools`` and
``response_format`` on a system or developer message, ``task``, ``wo_eos`` on any.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar, Literal

from dsv4.errors import EncodingError

Message = dict[str, Any]
Segment = tuple[str, bool]

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"
EXTRACTED_URL = "<｜extracted_url｜>"
TASKS = {
    name: f"<｜{name}｜>"
    for name in ("action", "query", "authority", "domain", "title", "read_url")
}
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_END = "<｜fim▁end｜>"

SPECIAL_TOKENS: tuple[str, ...] = (
    BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK, DSML, LATEST_REMINDER,
    *TASKS.values(), EXTRACTED_URL, FIM_HOLE, FIM_BEGIN, FIM_END,
)  # fmt: skip
"""Every token with a meaning to the template, in the order a new tokenizer numbers them."""

EFFORTS: dict[str, tuple[str, str | None]] = {
    "off": ("chat", None),
    "high": ("thinking", "high"),
    "max": ("thinking", "max"),
}
"""Public effort -> (``thinking_mode``, ``reasoning_effort``) of the April 2026 weights."""

_MAX_EFFORT = """\
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
                out.template(_MAX_EFFORT)
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
        if self.pieces and self.pieces[-1][1] == allow_special:
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
    out.plain(message.get("content") or "")
    calls = message.get("tool_calls")
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


# ------------------------------------------------------------------ completion -> message


def parse_completion(
    text: str,
    thinking_mode: str,
    strict: bool = False,
    tools: Sequence[Any] | Literal["any"] | None = "any",
    tool_choice: Any = "auto",
) -> Message:
    """The assistant message that a completion spells.

    ``text`` is what came after the prompt, EOS included if it was sampled. The message has
    ``role``, ``content``, ``reasoning_content`` and ``tool_calls`` (lists and strings may be
    empty, none is missing).

    With ``strict``, exactly what the official parser accepts is accepted, anything else raises
    EncodingError; arguments are pasted as they came, and calls have no ids. Otherwise nothing
    raises: see ``StreamingParser``. ``tools="any"`` takes calls to any name, with DSML tags only.
    """
    if strict:
        return _parse_strictly(text, thinking_mode)
    parser = StreamingParser(thinking_mode, tools, tool_choice)
    parser.feed(text)
    return parser.finish("stop").message


def _parse_strictly(text: str, thinking_mode: str) -> Message:
    opener = f"\n\n<{DSML}tool_calls"
    reasoning = ""
    position = 0
    if thinking_mode == "thinking":
        reasoning, stop, position = _until(text, 0, END_THINK, opener)
        if stop != END_THINK:
            raise _malformed("reasoning that ends with </think> before any tool call", text)
    content, stop, position = _until(text, position, EOS, opener)
    if stop is None:
        raise _malformed(f"content that ends with {EOS} or a tool call block", text[position:])
    calls: list[Message] = []
    if stop == opener:
        calls, position = _strict_calls(text, position)
        rest, _, position = _until(text, position, EOS)
        if rest:
            raise _malformed("nothing but EOS after the tool call block", rest)
    if position != len(text):
        raise _malformed("nothing after EOS", text[position:])
    for token in (BOS, EOS, THINK, END_THINK, DSML):
        if token in content or token in reasoning:
            raise _malformed("no special token in content or reasoning", token)
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
    }


def _strict_calls(text: str, position: int) -> tuple[list[Message], int]:
    """Calls of the block whose opener (without its ``>``) ends at ``position``; where it ends."""
    invoke, end_invoke = f"<{DSML}invoke", f"</{DSML}invoke"
    parameter, end_block = f"<{DSML}parameter", f"</{DSML}tool_calls>"
    calls: list[Message] = []
    while position < len(text):
        between, stop, position = _until(text, position, invoke, end_block)
        if between != ">\n" or stop is None:
            raise _malformed("'>' and a newline, then an invoke or the end of the block", between)
        if stop == end_block:
            break
        head, stop, position = _until(text, position, parameter, end_invoke)
        name = re.search(r'\A\s*name="(.*?)">\n$', head, re.DOTALL)
        if name is None or stop is None:
            raise _malformed(f'{invoke} name="...">, a newline, and its end', head)
        arguments: dict[str, str] = {}
        while stop == parameter:
            inner, _, position = _until(text, position, f"/{DSML}parameter")
            value = re.search(r'\A name="(.*?)" string="(true|false)">(.*?)<$', inner, re.DOTALL)
            if value is None or value[1] in arguments:
                raise _malformed(
                    f'{parameter} name="..." string="true|false">, each name once', inner
                )
            arguments[value[1]] = _dump(value[3]) if value[2] == "true" else value[3]
            between, stop, position = _until(text, position, parameter, end_invoke)
            if between != ">\n" or stop is None:
                raise _malformed("'>', a newline, then a parameter or an end", between)
        pasted = ", ".join(f"{_dump(key)}: {value}" for key, value in arguments.items())
        function = {"name": name[1], "arguments": "{" + pasted + "}"}
        calls.append({"type": "function", "function": function})
    return calls, position


def _until(text: str, start: int, *stops: str) -> tuple[str, str | None, int]:
    """Text up to the first of ``stops``, which one it was (None: the text ended), where it ends."""
    found = [(at, stop) for stop in stops if (at := text.find(stop, start)) >= 0]
    if not found:
        return text[start:], None, len(text)
    at, stop = min(found)
    return text[start:at], stop, at + len(stop)


def _malformed(expected: str, got: str) -> EncodingError:
    return EncodingError("not a well-formed completion", expected=expected, got=repr(got[:200]))


# ------------------------------------------------------------------ completion, piece by piece


@dataclass(frozen=True)
class ReasoningDelta:
    """More text of ``reasoning_content``."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More text of ``content``."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete, checked call. ``arguments`` is always the JSON text of an object."""

    index: int
    id: str
    name: str
    arguments: str


Event = ReasoningDelta | ContentDelta | ToolCall


@dataclass(frozen=True)
class Completion:
    """What ``StreamingParser.finish`` returns: the last events, and the whole message."""

    events: list[Event]
    message: Message
    finish_reason: str


def random_call_id(index: int) -> str:
    """``call_{index:02}_`` and 24 unguessable letters and digits."""
    alphabet = string.ascii_letters + string.digits
    return f"call_{index:02}_" + "".join(secrets.choice(alphabet) for _ in range(24))


@dataclass(frozen=True)
class _Tag:
    kind: Literal["block", "invoke", "parameter"]
    closing: bool
    dsml: bool
    attributes: dict[str, str]
    self_closing: bool


_DSML_LIKE = r"(?:[｜|]{0,2}DSML[｜|]{0,2})"
_KINDS = r"(?:(?P<block>(?:tool|function)_?calls?)|(?P<invoke>invoke)|(?P<parameter>parameter))"
_TAG = re.compile(
    rf"<\s*(?P<close>/?)\s*(?P<dsml>{_DSML_LIKE}?)\s*{_KINDS}(?=[\s/>])"
    r"""(?P<rest>(?:[^>"']|"[^"]*"|'[^']*')*)>""",
    re.IGNORECASE,
)
_TAG_HEAD = re.compile(rf"<\s*/?\s*{_DSML_LIKE}?\s*{_KINDS}(?:[\s/>]|$)", re.IGNORECASE)
_TAG_PREFIXES = frozenset(
    text[:n]
    for close in ("", "/")
    for dsml in ("", "dsml", "|dsml", "dsml|", "|dsml|", "||dsml||", "||dsml|", "|dsml||")
    for kind in (
        "tool_calls",
        "toolcalls",
        "function_calls",
        "functioncalls",
        "invoke",
        "parameter",
    )
    for text in ["<" + close + dsml + kind]
    for n in range(1, len(text) + 1)
)
_ATTRIBUTE = re.compile(r"""([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'/>]+))""")
_LONGEST_TAG = 400  # characters; longer is text
_STRIPPED = frozenset(t for t in SPECIAL_TOKENS if t.startswith("<"))
_STRIPPED_PREFIXES = frozenset(t[:n] for t in _STRIPPED for n in range(1, len(t)))


def _read_tag(text: str) -> _Tag | bool:
    """The tool tag that ``text`` is; True if it may become one with more text; False if never."""
    if len(text) > _LONGEST_TAG or "<" in text[1:]:
        return False
    if text[-1] != ">":
        compact = "".join(text.split()).lower().replace("｜", "|")
        return compact in _TAG_PREFIXES or _TAG_HEAD.match(text) is not None
    match = _TAG.fullmatch(text)
    if match is None:
        return _TAG_HEAD.match(text) is not None  # a ">" inside quotes
    rest = match["rest"].strip()
    attributes = {m[1].lower(): m[2] or m[3] or m[4] or "" for m in _ATTRIBUTE.finditer(rest)}
    if "name" not in attributes and (bare := re.fullmatch(r'"([^"]+)"\s*/?', rest)):
        attributes["name"] = bare[1]
    kind: Literal["block", "invoke", "parameter"] = "block"
    if not match["block"]:
        kind = "invoke" if match["invoke"] else "parameter"
    return _Tag(kind, bool(match["close"]), bool(match["dsml"]), attributes, rest.endswith("/"))


class _Place:
    """Where in the text we are: inside a code fence, a code span, a quotation, within a line?

    Spans and quotations may go over lines; a blank line ends them.
    """

    def __init__(self) -> None:
        self._fence = ""  # the marker that will close the open fence
        self._head = ""  # the first characters of this line that are not white space
        self._start_paragraph()

    def _start_paragraph(self) -> None:
        self._code = self._quote = self._block_quote = False
        self._open_quotes = 0
        self._last = ""

    def feed(self, text: str) -> None:
        for ch in text:
            if ch == "\n":
                self._end_line()
            else:
                if len(self._head) < 3 and not (ch.isspace() and not self._head):
                    self._head += ch
                self._code ^= ch == "`"
                self._quote ^= ch == '"'
                self._block_quote |= self._head == ">"
                self._open_quotes += (ch in "“「『") - (ch in "”」』")
                self._last = ch

    def _end_line(self) -> None:
        is_fence = self._head == self._fence if self._fence else self._head in ("```", "~~~")
        if is_fence:
            self._fence = "" if self._fence else self._head
        if is_fence or not self._head:
            self._start_paragraph()
        self._head = ""

    @property
    def mid_line(self) -> bool:
        return self._head != ""

    @property
    def quoted(self) -> bool:
        in_code = self._fence != "" or self._code or self._head in ("```", "~~~")
        in_quotes = self._quote or self._open_quotes > 0 or self._last in ("'", "‘")
        return in_code or in_quotes or self._block_quote


class StreamingParser:
    """Turns a completion into reasoning, content and tool calls while it is being generated.

    Feed it text in any pieces: the events, with neighbouring deltas of one kind joined, and the
    final message depend on the whole text only. Deltas never hold a special token, nor any part
    of a tag that belongs to a published call: what could be the start of one is held back and
    shown as soon as it proves to be text. A call comes as one event, once it is complete.

    Malformed calls are understood where the meaning is plain (missing or misnamed wrapper, DSML
    marks missing or in ASCII, JSON in place of parameters, missing final closers, loose JSON,
    types that the schema corrects). But markup is a call only if ``tools`` declare its name, up
    to case and punctuation; ``tool_choice`` is not "none"; its invoke was closed; the required
    arguments are there; and it is not quoted in a code fence, code span or quotation marks. A
    block that starts within a line must end one; one within reasoning must end the completion.
    Markup that fails this is text. Text after the first call is dropped (see ``dropped``).

    ``thinking_mode`` "thinking" starts in reasoning, "chat" in content (``generation_mode``).
    ``tools`` are OpenAI tool dicts; None or empty: tool markup is never looked at; "any": every
    name is taken, but only in tags with DSML. ``make_id`` makes the id of the n-th call.
    """

    def __init__(
        self,
        thinking_mode: str,
        tools: Sequence[Any] | Literal["any"] | None = None,
        tool_choice: Any = "auto",
        make_id: Callable[[int], str] = random_call_id,
    ) -> None:
        if isinstance(tool_choice, Mapping):
            tool_choice = tool_choice.get("type")
        self._tools = _Tools(tools)
        self._active = bool(tools) and tool_choice != "none"
        self._make_id = make_id
        self._in_reasoning = thinking_mode == "thinking"
        self._step: Callable[[str], None] = self._in_text  # what the next character goes to
        self._place = _Place()
        self._space = ""  # white space that may turn out to precede a block
        self._tag = ""  # from a "<" on: may become a tag or a special token
        self._ended = False
        self._events: list[Event] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self.dropped: list[str] = []
        """What the model wrote but no event shows: text after a call, a call cut off."""
        # The block being read; all of it is held back until it is a call or proves to be text.
        self._lead = ""  # the white space before it
        self._raw: list[str] = []  # its characters that are not yet dealt with
        self._wrapped = False  # it began with a wrapper tag
        self._tentative = False  # its calls count only if the text goes on as it should
        self._found: list[tuple[str, str]] = []  # tentative calls: name and arguments
        self._failed = False  # part of it was shown as text
        self._name: str | None = None
        self._parameters: list[tuple[str, str | None, str]] = []
        self._parameter: tuple[str, str | None] = ("", None)
        self._value: list[str] = []
        self._closer = _TAG
        self._tail: list[str] = []  # after a tentative block

    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of the completion; returns the events it settled."""
        for ch in text:
            if self._ended:
                break
            self._step(ch)
        events, self._events = self._events, []
        return events

    def finish(self, reason: str = "stop") -> Completion:
        """Ends the completion: everything held back becomes a call, or text.

        ``reason`` is why generation ended: "stop" for EOS or a stop string, anything else (such
        as "length") for a cut, after which an unfinished call is neither made nor shown. The
        completion's ``finish_reason`` is ``reason``, or "tool_calls" where a stop ended in calls.
        """
        natural = self._ended or reason in ("stop", "tool_calls")
        if self._step == self._in_text:
            self._finish_text(natural)
        else:
            self._finish_block(natural)
        self._ended = True
        if natural:
            reason = "tool_calls" if self._calls else "stop"
        calls = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in self._calls
        ]
        message: Message = {
            "role": "assistant",
            "content": "".join(self._content),
            "reasoning_content": "".join(self._reasoning),
            "tool_calls": calls,
        }
        return Completion(self.feed(""), message, reason)

    # ---------------------------------------------------------------- text

    def _in_text(self, ch: str) -> None:
        if self._tag:
            tag = self._extend_tag(ch)
            if isinstance(tag, _Tag) and self._may_open(tag):
                self._open_block(tag)
            elif tag is not None:
                self._retry_tag_as_text()
        elif ch == "<":
            self._tag = ch
        elif self._active and ch.isspace():
            self._space += ch
            self._place.feed(ch)
        else:
            self._show(ch)

    def _extend_tag(self, ch: str) -> _Tag | Literal[False] | None:
        """Adds to the tag being read: the tool tag it is now, False if none, None if unsettled.

        A special token is dealt with, and unsettled.
        """
        self._tag += ch
        if self._tag in _STRIPPED:
            token, self._tag = self._tag, ""
            if token == EOS:
                self._ended = True
            elif token == END_THINK and self._in_reasoning:
                self._end_reasoning()
            return None
        if self._tag in _STRIPPED_PREFIXES:
            return None
        tag = _read_tag(self._tag) if self._active else False
        return None if tag is True else tag

    def _end_reasoning(self) -> None:
        if self._step == self._after_block:
            return  # a call in reasoning: </think> may follow it
        if self._step != self._in_text:
            self._give_up_block(END_THINK)  # comes back here
            return
        self._show("")
        self._in_reasoning = False
        self._place = _Place()

    def _retry_tag_as_text(self) -> None:
        """The "<" was text; what follows it is looked at afresh."""
        tag, self._tag = self._tag, ""
        self._show(tag[0])
        self._again(tag[1:])

    def _again(self, text: str) -> None:
        for ch in text:
            if not self._ended:
                self._step(ch)

    def _show(self, text: str) -> None:
        if self._active:
            self._place.feed(text)
        text, self._space = self._space + text, ""
        self._emit(text)

    def _emit(self, text: str) -> None:
        if not text:
            return
        if self._calls:
            self.dropped.append(text)
            return
        kind = ReasoningDelta if self._in_reasoning else ContentDelta
        (self._reasoning if self._in_reasoning else self._content).append(text)
        last = self._events[-1] if self._events else None
        if isinstance(last, kind):
            self._events[-1] = kind(last.text + text)
        else:
            self._events.append(kind(text))

    def _finish_text(self, natural: bool) -> None:
        tag, self._tag = self._tag, ""
        half_a_marker = "｜" in tag or tag[:4] in ("<thi", "</th")
        if tag and half_a_marker and not natural:
            self.dropped.append(tag)
            tag = ""
        self._show(tag)

    # ---------------------------------------------------------------- a block of calls

    def _may_open(self, tag: _Tag) -> bool:
        opens = tag.kind != "parameter" and not tag.closing
        return opens and (tag.dsml or not self._tools.any) and not self._place.quoted

    def _open_block(self, tag: _Tag) -> None:
        self._lead, self._space = self._space, ""
        self._raw = [self._tag]
        self._tag = ""
        self._failed = False
        self._found = []
        self._tentative = self._in_reasoning or self._place.mid_line
        self._enter(tag)

    def _enter(self, tag: _Tag) -> None:
        self._wrapped = tag.kind == "block"
        self._step = self._between_invokes
        if tag.kind == "invoke":
            self._open_invoke(tag)

    def _open_invoke(self, tag: _Tag) -> None:
        self._name = tag.attributes.get("name")
        self._parameters, self._value = [], []
        self._step = self._in_invoke
        if tag.self_closing:
            self._close_invoke()

    def _between_invokes(self, ch: str) -> None:
        self._raw.append(ch)
        if not self._tag:
            if ch == "<":
                self._tag = ch
            elif not ch.isspace():
                body = not (self._found or self._failed or self._calls)
                self._name, self._parameters = None, []
                self._open_body(ch, "block") if body else self._give_up_block(ch)
            return
        tag = self._extend_tag(ch)
        if tag is None:
            return
        text, self._tag = self._tag, ""
        if tag and tag.kind == "block" and tag.closing:
            self._close_block()
        elif tag and tag.kind == "invoke" and not tag.closing:
            self._open_invoke(tag)
        elif not tag or tag.kind != "block":
            self._give_up_block(text)

    def _in_invoke(self, ch: str) -> None:
        self._raw.append(ch)
        if not self._tag:
            if ch == "<":
                self._tag = ch
            elif not ch.isspace():
                may_be_body = not self._parameters and (self._name is None or ch in "{[`")
                self._open_body(ch, "invoke") if may_be_body else self._give_up_block(ch)
            return
        tag = self._extend_tag(ch)
        if tag is None:
            return
        text, self._tag = self._tag, ""
        if not tag:
            self._give_up_block(text)
        elif tag.kind == "parameter" and not tag.closing:
            self._open_parameter(tag)
        elif tag.kind == "invoke" and tag.closing:
            self._close_invoke()
        elif tag.kind == "parameter":
            pass  # one closer too many
        elif not self._parameters or tag.closing == (tag.kind == "invoke"):
            self._give_up_block(text)
        else:  # the next invoke, or the end of the block: this one's own closer is missing
            self._raw = ["".join(self._raw).removesuffix(text)]
            self._close_invoke()
            self._again(text)

    def _open_parameter(self, tag: _Tag) -> None:
        asks = tag.attributes.get("string", "").strip().lower()
        self._parameter = (
            tag.attributes.get("name", ""),
            asks if asks in ("true", "false") else None,
        )
        if tag.self_closing:
            self._parameters.append((*self._parameter, ""))
            return
        self._value = []
        self._closer = _CLOSERS["parameter", tag.dsml]
        self._step = self._in_parameter

    def _in_parameter(self, ch: str) -> None:
        self._raw.append(ch)
        self._value.append(ch)
        if ch == ">" and not self._thinking_ended():
            end = self._closer.search("".join(self._value[-_LONGEST_CLOSER:]))
            if end:
                value = "".join(self._value)[: -len(end[0])]
                self._parameters.append((*self._parameter, value))
                self._step = self._in_invoke

    def _thinking_ended(self) -> bool:
        """Within reasoning, ``</think>`` ends it even inside what looked like a call."""
        if not self._in_reasoning or "".join(self._value[-len(END_THINK) :]) != END_THINK:
            return False
        self._give_up_block(END_THINK)
        return True

    def _open_body(self, ch: str, closed_by: str) -> None:
        self._value = []
        self._closer = _CLOSERS[closed_by, False]
        self._step = self._in_body
        self._raw.pop()
        self._in_body(ch)

    def _in_body(self, ch: str) -> None:
        """JSON, perhaps fenced, perhaps after a name, in the place of parameters."""
        self._raw.append(ch)
        self._value.append(ch)
        if not _BODY_START.match("".join(self._value[:80])):
            self._give_up_block("".join(self._value))
        elif ch == ">" and not self._thinking_ended():
            end = self._closer.search("".join(self._value[-_LONGEST_CLOSER:]))
            if end:
                del self._value[-len(end[0]) :]
                by_block = self._closer is _CLOSERS["block", False]
                self._close_invoke()
                if by_block and self._step == self._between_invokes:
                    self._close_block()

    def _close_invoke(self) -> bool:
        """Checks the invoke just read; whether it was a call. It is published or shown as text."""
        body = "".join(self._value) if self._step == self._in_body else None
        found = self._tools.resolve(self._name, self._parameters, body)
        self._step = self._between_invokes if self._wrapped else self._in_text
        if self._tentative:
            if not found:
                self._give_up_block("")
            elif not self._wrapped:
                self._step = self._after_block
                self._tail = []
            self._found += found
        elif found:
            self._publish(found)
        else:
            self._failed = True
            self._show_raw()
        return bool(found)

    def _close_block(self) -> None:
        if self._tentative and self._found:
            self._step = self._after_block
            self._tail = []
        elif self._tentative:
            self._give_up_block("")
        else:
            if self._failed:
                self._show_raw()
            else:  # an empty block, or the end of one whose calls are out
                self._publish([])
            self._step = self._in_text

    def _after_block(self, ch: str) -> None:
        """After a tentative block: what follows decides whether it was one."""
        self._tail.append(ch)
        if not self._tag:
            if ch == "<":
                self._tag = ch
            elif ch == "\n" and not self._in_reasoning:
                self._commit()
            elif not ch.isspace():
                self._give_up_block("".join(self._tail))
            return
        tag = self._extend_tag(ch)
        if tag is None:
            return
        tail, self._tag = "".join(self._tail), ""
        if tag and tag.closing:
            pass  # of a wrapper that never opened
        elif not tag or tag.kind == "parameter" or END_THINK in tail:
            self._give_up_block(tail)
        else:
            self._raw.append(tail)
            self._enter(tag)

    def _give_up_block(self, rest: str) -> None:
        """The block is text after all; ``rest``, its unread end, is read again."""
        raw = "".join(self._raw)
        self._raw = [raw.removesuffix(rest)]
        self._tag = ""
        self._show_raw()
        self._step = self._in_text
        self._again(rest)

    def _show_raw(self) -> None:
        raw = self._lead + "".join(self._raw)
        self._lead, self._raw = "", []
        for token in _STRIPPED:
            raw = raw.replace(token, "")
        self._show(raw)

    def _commit(self) -> None:
        found, self._found = self._found, []
        self._publish(found)
        self._step = self._in_text

    def _publish(self, found: list[tuple[str, str]]) -> None:
        """The block's markup and the two newlines before it disappear; its calls come out."""
        lead, self._lead, self._raw = self._lead, "", []
        self._emit(lead[:-2] if lead.endswith("\n\n") else lead.rstrip())
        if found and self._in_reasoning:
            self._in_reasoning = False
            self._place = _Place()
        for name, arguments in found:
            index = len(self._calls)
            call = ToolCall(index, self._make_id(index), name, arguments)
            self._calls.append(call)
            self._events.append(call)

    def _finish_block(self, natural: bool) -> None:
        if natural:
            self._close_at_end()
        after, between = self._step == self._after_block, self._step == self._between_invokes
        settled = natural or (after and not self._in_reasoning)
        if settled and (after or (between and self._found)):
            self._commit()
        if self._step == self._in_text:
            self._finish_text(natural)
        elif natural:
            self._give_up_block("")
        else:
            held = "".join(self._raw)
            self._publish([])
            self.dropped.append(held)

    def _close_at_end(self) -> None:
        """The end of the completion stands for closing tags that are missing, even in part."""
        complete = self._step == self._in_invoke and bool(self._parameters)
        if self._step == self._in_body:
            body = re.sub(r"\s*(<[^<>]*|" + re.escape(EOS) + r")$", "", "".join(self._value))
            complete = _BODY_END.search(body) is not None
            self._value = list(body)
        partial = self._tag
        if complete and (not partial or partial[1:].lstrip().startswith("/") or partial == "<"):
            self._tag = ""
            self._close_invoke()


_CLOSERS = {
    (kind, dsml): re.compile(
        rf"<\s*/\s*{_DSML_LIKE}{'' if dsml else '?'}\s*{name}\s*>\Z", re.IGNORECASE
    )
    for kind, name in (
        ("parameter", "parameter"),
        ("invoke", "invoke"),
        ("block", "(?:tool|function)_?calls?"),
    )
    for dsml in (True, False)
}
_LONGEST_CLOSER = 48  # characters
_BODY_START = re.compile(r"[\w.-]{0,64}\s*(?:\Z|[{\[]|`{1,2}\Z|```)")
_BODY_END = re.compile(r"[}\]`]\s*\Z")


# ------------------------------------------------------------------ calls and their arguments


class _Tools:
    """The declared tools: which calls they allow, and what their arguments mean."""

    def __init__(self, tools: Sequence[Any] | Literal["any"] | None) -> None:
        self.any = isinstance(tools, str)
        self._schemas: dict[str, Mapping[str, Any]] = {}
        declared: Sequence[Any] = () if tools is None or isinstance(tools, str) else tools
        for tool in declared:
            function = tool.get("function", tool)  # the bare function is taken too
            schema = function.get("parameters")
            self._schemas[str(function["name"])] = schema if isinstance(schema, Mapping) else {}

    def resolve(
        self,
        name: str | None,
        parameters: Sequence[tuple[str, str | None, str]],
        body: str | None,
    ) -> list[tuple[str, str]]:
        """Name and arguments of the call that was written; [] if it may not be made.

        ``parameters`` are (name, string attribute, text). With a ``body`` they do not count, and
        it may hold the name, or several calls: then all of them may be made, or none.
        """
        if body is None:
            found = [self._check(name, lambda s: {
                _match(key, s) or key: _argument(text, asks, s.get(_match(key, s) or key))
                for key, asks, text in parameters
            })]  # fmt: skip
        else:
            found = [
                self._check(n, lambda s, a=arguments: _arguments_of(a, s))  # type: ignore[misc]
                for n, arguments in _calls_in(name, body)
            ]
        return [call for call in found if call] if all(found) else []

    def _check(
        self, name: str | None, read: Callable[[Mapping[str, Any]], dict[str, str]]
    ) -> tuple[str, str] | None:
        declared = name if self.any else _match(name or "", self._schemas)
        if not declared:
            return None
        schema = self._schemas.get(declared, {})
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        arguments = read(properties)
        if not self.any and len(arguments) == 1:
            (key, text), = arguments.items()  # fmt: skip
            if key in ("arguments", "input", "parameters") and key not in properties:
                inner = _loads(json.loads(text)) if text.startswith('"') else _loads(text)
                if isinstance(inner, dict):
                    arguments = _arguments_of(inner, properties)
        required = schema.get("required")
        if isinstance(required, list) and not all(key in arguments for key in required):
            return None
        return declared, "{" + ", ".join(f"{_json(k)}: {v}" for k, v in arguments.items()) + "}"


def _match(name: str, declared: Mapping[str, Any]) -> str | None:
    """The declared name, or the only one that differs in case, punctuation or a namespace."""
    if name in declared:
        return name
    for candidate in (name, re.split(r"[.:/]", name)[-1]):
        key = _letters(candidate)
        matches = [d for d in declared if key and _letters(d) == key]
        if len(matches) == 1:
            return matches[0]
    return None


def _letters(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def _calls_in(name: str | None, body: str) -> list[tuple[str | None, dict[str, Any]]]:
    """(name, arguments) of the calls that a JSON body spells; a None name where there is none."""
    text = body.strip()
    if name is None and (start := re.match(r"([\w.-]+)\s*(?=[{\[`])", text)):
        name, text = start[1], text[start.end() :]
    if fenced := re.fullmatch(r"```\w*\s(.*?)```", text, re.DOTALL):
        text = fenced[1]
    value = _loads(text)
    calls: list[tuple[str | None, dict[str, Any]]] = []
    for item in value if isinstance(value, list) and name is None else [value]:
        call = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(call, dict):
            return [(None, {})]
        inner = [call[k] for k in ("arguments", "parameters", "input") if k in call]
        is_whole_call = name is None or (call.get("name") == name and len(inner) == 1)
        if is_whole_call:
            arguments = inner[0] if inner else {}
            arguments = _loads(arguments) if isinstance(arguments, str) else arguments
            if not isinstance(arguments, dict):
                return [(None, {})]
            calls.append((str(call.get("name") or ""), arguments))
        else:
            calls.append((name, call))
    return calls or [(None, {})]


def _arguments_of(values: Mapping[str, Any], properties: Mapping[str, Any]) -> dict[str, str]:
    """JSON text of each argument, under its declared name."""
    keys = {key: _match(key, properties) or key for key in values}
    return {
        keys[key]: _argument(_json(value), "false", properties.get(keys[key]))
        for key, value in values.items()
    }


def _argument(text: str, asks: str | None, schema: Any) -> str:
    """JSON text of one argument that the model wrote as ``text``.

    ``asks`` is its ``string`` attribute: "true" for a string, "false" for JSON, None if unknown.
    The schema decides where that is unknown, or where the value does not fit its types.
    """
    types = _types(schema)
    as_string = _json(text)
    if asks == "true" or (asks is None and "string" in types):
        if not types or "string" in types:
            return as_string
        value = _loads(text)
        return _as_written(text, value) if _fits(value, types) else as_string
    if asks is None and not types:
        value = _loads(text, loose=False)
        return as_string if value is _NOT_JSON else text
    value = _loads(text)
    if value is _NOT_JSON:
        return as_string
    if types and not _fits(value, types):
        if "string" in types:
            return as_string
        if isinstance(value, str) and _fits(inner := _loads(value), types):
            return _as_written(value, inner)
    return _as_written(text, value)


def _types(schema: Any) -> frozenset[str]:
    """JSON type names that a schema allows; empty when it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    if "type" in schema:
        names = schema["type"]
        return frozenset([names] if isinstance(names, str) else map(str, names))
    if isinstance(schema.get("enum"), list):
        return frozenset(_type_of(value) for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            branches = [_types(branch) for branch in schema[key]]
            return frozenset().union(*branches) if all(branches) else frozenset()
    return frozenset()


def _type_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return "null" if value is None else names.get(type(value), "object")


def _fits(value: Any, types: frozenset[str]) -> bool:
    if value is _NOT_JSON:
        return False
    name = _type_of(value)
    return name in types or (name == "integer" and "number" in types)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() or not re.search("[\ud800-\udfff]", text) else json.dumps(value)


_NOT_JSON = object()


def _loads(text: str, loose: bool = True) -> Any:
    """The JSON value that ``text`` is, or nearly is if ``loose``; else ``_NOT_JSON``."""
    try:
        return _strict_json(text)
    except (ValueError, RecursionError):
        pass
    try:
        return _LooseJSON(text).read() if loose else _NOT_JSON
    except (ValueError, RecursionError):
        return _NOT_JSON


def _strict_json(text: str) -> Any:
    def finite(number: str) -> float:
        if abs(value := float(number)) == float("inf"):
            raise ValueError(number)
        return value

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    return json.loads(text, parse_float=finite, parse_constant=refuse)


def _as_written(text: str, value: Any) -> str:
    """JSON text of ``value``: the model's own ``text`` where that is JSON already."""
    return _json(value) if _loads(text, loose=False) is _NOT_JSON else text


class _LooseJSON:
    """Reads what models write for JSON: bare words, single quotes, Python's names for true,
    false and null, commas too many, raw newlines in strings. ValueError if it makes no sense."""

    _words: ClassVar[dict[str, bool | None]] = {
        "true": True, "false": False, "null": None, "none": None,
    }  # fmt: skip

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def read(self) -> Any:
        value = self._value()
        if self._next():
            raise ValueError("text after the value")
        return value

    def _next(self) -> str:
        """The next character that is not white space, "" at the end."""
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        return self._text[self._at : self._at + 1]

    def _take(self, *expected: str) -> str:
        ch = self._next()
        if ch not in expected:
            raise ValueError(f"{ch!r} where one of {expected} belongs")
        self._at += 1
        return ch

    def _value(self) -> Any:
        ch = self._next()
        if ch == "{":
            return dict(self._items("}", self._pair))
        if ch == "[":
            return list(self._items("]", self._value))
        return self._string() if ch and ch in "\"'" else self._bare(r"[^,\[\]{}\"'\n]+")

    def _items(self, closer: str, read: Callable[[], Any]) -> Iterator[Any]:
        self._at += 1
        while self._next() != closer:
            yield read()
            if self._next() != closer:
                self._take(",")
        self._at += 1

    def _pair(self) -> tuple[str, Any]:
        quoted = self._next() in ('"', "'")
        key = self._string() if quoted else str(self._bare(r"[^,:\[\]{}\"'\n]+", words=False))
        self._take(":")
        return key, self._value()

    def _string(self) -> str:
        quote = self._take('"', "'")
        match = re.compile(rf"((?:[^{quote}\\]|\\.)*){quote}", re.DOTALL).match(
            self._text, self._at
        )
        if match is None:
            raise ValueError("a string without an end")
        self._at = match.end()
        inner = match[1].replace("\\'", "'")
        if quote == "'":
            inner = re.sub(r'(?<!\\)"', '\\"', inner)
        return str(json.loads(f'"{inner}"', strict=False))

    def _bare(self, pattern: str, words: bool = True) -> Any:
        match = re.compile(pattern).match(self._text, self._at)
        word = match[0].strip() if match else ""
        if not match or not word:
            raise ValueError("no value")
        self._at = match.end()
        if words and word.lower() in self._words:
            return self._words[word.lower()]
        try:
            return _strict_json(word) if words else word
        except ValueError:
            return word

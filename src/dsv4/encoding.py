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
from collections.abc import Mapping, Sequence
from typing import Any

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

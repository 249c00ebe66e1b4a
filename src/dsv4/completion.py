"""Completions to messages: what the model wrote, read back while it is being written.

* ``parse_completion(strict=True)`` accepts exactly what the official parser accepts.
* ``StreamingParser`` is the tolerant one: text goes in piece by piece, text and tool calls come
  out, the same for every way of cutting the text. ``parse_completion(strict=False)`` uses it.

The other direction is ``encoding``, which offers everything public here under its own name too.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import EncodingError
from .special_tokens import BOS, DSML, END_THINK, EOS, SPECIAL_TOKENS, THINK
from .tool_arguments import DeclaredTools

Message = dict[str, Any]


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


def _dump(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


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
        self._tools = DeclaredTools(tools)
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

"""Grammars for answers: which tokens may come next, so that what is promised is what comes.

``GuideMaker`` turns a request into a ``Guide`` for the engine. A guide knows where the answer is:
within reasoning nothing is forced but its end, when the budget is used up. After it, a schema or a
demanded call holds token by token (llguidance), and tools marked ``strict`` are held to their
schemas from the moment the model opens a call.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from ..encoding import DSML, END_THINK
from ..engine.sample import Allowed
from ..errors import EncodingError, RequestError
from ..tokenizer import Tokenizer
from .backend import ChatRequest

# Between the tokens of JSON: enough to indent, too little to run away in.
_LOOSE_SPACE = {"whitespace_pattern": r"[ \t\n\r]{0,24}"}
_TIGHT_SPACE = {"whitespace_pattern": r"[ ]?"}


class Guide:
    """One answer's guide, from the first token after the prompt. Used by one thread.

    ``budget`` tokens of reasoning; ``grammar`` holds from the start of the answer,
    ``call_grammar`` from the first tool-call marker on. ``must_speak``: the first token of the
    answer is one that is shown.
    """

    def __init__(
        self,
        maker: GuideMaker,
        *,
        reasons: bool,
        budget: int | None = None,
        grammar: str = "",
        call_grammar: str = "",
        must_speak: bool = False,
    ) -> None:
        self._maker = maker
        self._reasons, self._thought = reasons, 0
        self._budget = budget
        self._call_grammar = call_grammar
        self._must_speak = must_speak
        self._held = bool(grammar)
        self._matcher = maker.matcher(grammar) if grammar else None

    def allowed(self) -> Allowed | None:
        if self._reasons:
            if self._budget is not None and self._thought >= self._budget:
                return self._maker.only(self._maker.end_think)
            return self._maker.without_end if self._held else None
        if self._matcher is not None:
            if self._matcher.is_stopped():
                return self._maker.only(self._maker.eos)
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            return np.unpackbits(bits, bitorder="little")[: self._maker.vocab_size].astype(np.bool_)
        return self._maker.spoken if self._must_speak else None

    def accept(self, token: int) -> None:
        if self._reasons:
            self._thought += 1
            self._reasons = token != self._maker.end_think
            return
        self._must_speak = False
        if self._matcher is not None:
            if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
                raise RequestError(
                    "the grammar of the answer cannot go on", got=self._matcher.get_error()
                )
        elif token == self._maker.dsml and self._call_grammar:
            self._matcher = self._maker.matcher(self._call_grammar)


class GuideMaker:
    """Makes guides for one tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._llg: LLTokenizer | None = None
        self.vocab_size = tokenizer.vocab_size
        self.eos = tokenizer.eos_id
        self.end_think = tokenizer.special_id(END_THINK)
        self.dsml = _id(tokenizer, DSML)
        everything = np.ones(self.vocab_size, np.bool_)
        self.without_end = everything.copy()
        self.without_end[self.eos] = False
        self.spoken = everything
        shown = [i for text, i in tokenizer.special_ids.items() if text != DSML]
        self.spoken[shown] = False

    def only(self, token: int) -> Allowed:
        mask = np.zeros(self.vocab_size, np.bool_)
        mask[token] = True
        return mask

    def make(self, request: ChatRequest, tools: Sequence[Any], reasons: bool) -> Guide | None:
        """The guide of a request, None when it needs none. Raises RequestError for schemas that
        cannot be enforced; slow for large ones, so not on an event loop."""
        grammar, call_grammar = self._grammars(request, tools)
        budget = request.max_thinking_tokens if reasons else None
        if not (grammar or call_grammar) and budget is None:
            return None
        return Guide(
            self, reasons=reasons, budget=budget, grammar=grammar, call_grammar=call_grammar
        )

    def speaking(self, request: ChatRequest, tools: Sequence[Any]) -> Guide:
        """The guide of a second try, after an answer without a word."""
        _, call_grammar = self._grammars(request, tools)
        return Guide(self, reasons=False, call_grammar=call_grammar, must_speak=True)

    def matcher(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokens(), grammar)

    def _grammars(self, request: ChatRequest, tools: Sequence[Any]) -> tuple[str, str]:
        """What holds from the answer's start, and what from the first tool-call marker."""
        functions = [tool.get("function", tool) for tool in tools]
        strict = any(f.get("strict") for f in functions)
        forced = request.tool_choice == "required" and bool(functions)
        several = request.parallel_tool_calls
        if forced and request.tool_name is not None:
            functions = [f for f in functions if f.get("name") == request.tool_name]
        writer = _Writer(self.dsml)
        if forced:
            start = f"start: {writer.literal(_OPEN)} {writer.block(functions, several)}\n"
            return self._checked(start + writer.text, "tools"), ""
        if request.schema is not None:
            json_rule = writer.json(request.schema, _LOOSE_SPACE, "answer")
            start = f"start: {json_rule}\n"
            if functions and request.tool_choice == "auto":
                block = writer.block(functions, several)
                start = f"start: {json_rule} | {writer.literal(_OPEN)} {block}\n"
            return self._checked(start + writer.text, "response_format"), ""
        if strict and request.tool_choice == "auto":
            start = f"start: {writer.block(functions, several, marked=True)}\n"
            return "", self._checked(start + writer.text, "tools")
        return "", ""

    def _checked(self, grammar: str, what: str) -> str:
        wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokens())
        if wrong:
            raise RequestError(f"Invalid schema in {what}: {messages[0][:500]}")
        return grammar

    def _tokens(self) -> LLTokenizer:
        with self._lock:
            if self._llg is None:
                self._llg = LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer)))
            return self._llg


_OPEN = "\n\n<"


class _Writer:
    """Writes rules of a Lark grammar; each method returns an expression that refers to them."""

    def __init__(self, dsml: int | None) -> None:
        if dsml is None:
            raise RequestError("this model's tokenizer has no tool-call token")
        self._mark = f"<[{dsml}]>"
        self._rules: dict[str, str] = {}

    @property
    def text(self) -> str:
        return "".join(f"{name}: {body}\n" for name, body in self._rules.items())

    def literal(self, text: str) -> str:
        return json.dumps(text)

    def json(self, schema: Any, space: Mapping[str, Any], name: str) -> str:
        return self._rule(name, f"%json {json.dumps({**schema, 'x-guidance': dict(space)})}")

    def block(self, functions: Sequence[Any], several: bool, marked: bool = False) -> str:
        """A whole block of calls after its ``<``, or, ``marked``, after its first marker."""
        invoke = " | ".join(self._call(f, f"call_{n}") for n, f in enumerate(functions))
        call = self._rule("call", invoke)
        newline = self.literal("\n")
        more = f"({newline} {call})*" if several else ""
        close = f"{self.literal(chr(10) + '</')} {self._mark} {self.literal('tool_calls>')}"
        start = "" if marked else self._mark
        return f"{start} {self.literal('tool_calls>' + chr(10))} {call} {more} {close}"

    def _call(self, function: Mapping[str, Any], name: str) -> str:
        head = f"{self.literal('<')} {self._mark} " + self.literal(
            f'invoke name="{function.get("name")}">\n'
        )
        close = f"{self.literal('</')} {self._mark} {self.literal('invoke>')}"
        schema = function.get("parameters")
        schema = schema if isinstance(schema, Mapping) else {}
        return self._rule(
            name, f"{head} {self._parameters(schema, bool(function.get('strict')), name)} {close}"
        )

    def _parameters(self, schema: Mapping[str, Any], strict: bool, name: str) -> str:
        nothing = self.literal("\n")
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            closed = schema.get("additionalProperties") is False or strict or not schema
            return nothing if closed else f"({self._anything()}+ | {nothing})"
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        parts = []
        for n, key in enumerate(properties):
            part = self._parameter(schema, key, strict, f"{name}_{n}")
            parts.append(part if key in required else f"{part}?")
        body = " ".join(parts)
        return body if any(key in required for key in properties) else f"({body} | {nothing})"

    def _parameter(self, whole: Mapping[str, Any], key: str, strict: bool, name: str) -> str:
        schema = whole["properties"][key]
        head = f"{self.literal('<')} {self._mark} " + self.literal(
            f'parameter name="{key}" string="'
        )
        close = f"{self._mark} {self.literal('parameter>' + chr(10))}"
        ways = []
        if (words := _words(schema)) is not None:
            texts = " | ".join(self.literal(f'true">{word}</') for word in words)
            ways.append(f"({texts})")
        else:
            if _plain_string(schema):
                ways.append(f"{self.literal('true' + chr(34) + '>')} {self._raw()}")
            if not (isinstance(schema, Mapping) and schema.get("type") == "string" and ways):
                value = self._json_value(whole, key, strict, f"{name}_value")
                ways.append(f"{self.literal('false' + chr(34) + '>')} {value} {self.literal('</')}")
        return self._rule(name, f"{head} ({' | '.join(ways)}) {close}")

    def _json_value(self, whole: Mapping[str, Any], key: str, strict: bool, name: str) -> str:
        """The property's schema; references still lead from the root of the whole one."""
        pointer = key.replace("~", "~0").replace("/", "~1").replace("%", "%25")
        schema: dict[str, Any] = {
            "$defs": {"whole": _moved(whole)},
            "$ref": f"#/$defs/whole/properties/{pointer}",
        }
        space: dict[str, Any] = dict(_TIGHT_SPACE)
        if not strict:  # an unknown keyword of an ordinary tool is no reason to refuse
            space["lenient"] = True
            told = json.dumps({**schema, "x-guidance": space})
            if LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(told)):
                schema = {}
        return self.json(schema, space, name)

    def _anything(self) -> str:
        """A parameter of any name and value."""
        if "anything" not in self._rules:
            head = f"{self.literal('<')} {self._mark} {self.literal('parameter name=' + chr(34))}"
            key = self._rule("KEY", r'/[^"<>\n]{1,64}" string="/')
            value = self.json({}, _TIGHT_SPACE, "any_value")
            text = f"{self.literal('true' + chr(34) + '>')} {self._raw()}"
            other = f"{self.literal('false' + chr(34) + '>')} {value} {self.literal('</')}"
            close = f"{self._mark} {self.literal('parameter>' + chr(10))}"
            self._rule("anything", f"{head} {key} ({text} | {other}) {close}")
        return "anything"

    def _raw(self) -> str:
        """Text as it is, up to the closing tag's ``</``."""
        return self._rule("RAW", r"/(.|\n)*<\//")

    def _rule(self, name: str, body: str) -> str:
        self._rules[name] = body
        return name


def _words(schema: Any) -> list[str] | None:
    """The only strings that a schema takes, None if it takes more or others."""
    if not isinstance(schema, Mapping):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    plain = set(schema) <= {"type", "enum", "const", "description", "title", "default", "examples"}
    if not plain or not isinstance(values, list) or not values:
        return None
    return values if all(isinstance(v, str) and DSML not in v for v in values) else None


_LIMITS = {"pattern", "format", "minLength", "maxLength", "enum", "const", "$ref", "allOf", "not"}


def _plain_string(schema: Any) -> bool:
    """Whether any string at all fits."""
    if not isinstance(schema, Mapping):
        return True
    if _LIMITS & set(schema):
        return False
    if "type" in schema:
        kind = schema["type"]
        return kind == "string" or (isinstance(kind, list) and "string" in kind)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return any(isinstance(b, Mapping) and _plain_string(b) for b in schema[key])
    return True


def _moved(value: Any) -> Any:
    """A schema whose references lead from where ``_json_value`` puts it."""
    if isinstance(value, Mapping):
        return {
            k: v.replace("#", "#/$defs/whole", 1)
            if k == "$ref" and isinstance(v, str) and v.startswith("#")
            else _moved(v)
            for k, v in value.items()
        }
    return [_moved(v) for v in value] if isinstance(value, list) else value


class _Vocabulary:
    """The tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = list(tokenizer.special_ids.values())
        self.tokens = [_bytes(tokenizer, i) for i in range(tokenizer.vocab_size)]
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace"))


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    try:
        return tokenizer.token_bytes(token)
    except EncodingError:
        return b""


def _id(tokenizer: Tokenizer, special: str) -> int | None:
    try:
        return tokenizer.special_id(special)
    except EncodingError:
        return None

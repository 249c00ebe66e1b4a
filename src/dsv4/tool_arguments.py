"""What a tool call means: its declared name, and its arguments as JSON that fits the schema.

Models write arguments as text, as JSON, or as something near JSON, under names that are nearly
right. What was meant is decided here by the declared schema, and never guessed beyond it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal


class DeclaredTools:
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

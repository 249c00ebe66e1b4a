"""Sessions of real programs, as they went over the wire: recorded, kept small, sent again.

A recording holds every request of a session, its headers and the spelling of its JSON included.
Three things are not the program's own any more: prose (system prompts, descriptions of tools) is
its length alone and is sent as filler of that length; names of machines and sessions are neutral;
and what the server itself chose (ids of answers and calls) is a mark, for which the answers of
the server that hears the session now are put.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11

FOLDER, HOME = "/home/user/project", "/home/user"
# ids that the server makes, in the order in which an answer has them
_ANSWERED = re.compile(
    r"call_\d\d_\w{24}|\b(?:rs|msg|fc|ctc|resp)_[0-9a-f]{32}"
    r"|[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"
)
_NAMED = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|\b[0-9a-f]{64}\b|\bses_\w{20,}"
)
_PROSE = re.compile("⟦([0-9]+)⟧")
_MARK = re.compile("«([0-9]+)[.]([0-9]+)»")
_ALWAYS_PROSE = ("description", "definition")
_SHARED = 200  # characters; what is longer and comes again is kept once


class Relay:
    """Passes a server's connections on, and keeps what goes through."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._connections: list[tuple[list[tuple[float, bytes]], bytearray]] = []
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            sent: list[tuple[float, bytes]] = []
            answered = bytearray()
            self._connections.append((sent, answered))

            def asking(a: socket.socket, b: socket.socket, log: list[tuple[float, bytes]]) -> None:
                _pass_on(a, b, lambda data: log.append((time.monotonic(), data)))

            def answering(a: socket.socket, b: socket.socket, log: bytearray) -> None:
                _pass_on(a, b, log.extend)

            threading.Thread(target=asking, args=(client, server, sent), daemon=True).start()
            threading.Thread(target=answering, args=(server, client, answered), daemon=True).start()

    def exchanges(self) -> list[Exchange]:
        """All of them, in the order in which they were asked."""
        found = []
        for sent, answered in self._connections:
            asked = list(_requests(sent))
            answers = _responses(bytes(answered), [e.method for e in asked])
            for exchange, answer in zip(asked, answers, strict=False):
                exchange.answer = answer
                found.append(exchange)
        return sorted(found, key=lambda e: e.when)


@dataclass
class Exchange:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    when: float = 0.0
    answer: str = field(default="", repr=False)


def _pass_on(source: socket.socket, target: socket.socket, keep: Any) -> None:
    try:
        while data := source.recv(1 << 16):
            keep(data)
            target.sendall(data)
    except OSError:
        pass
    for end, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        try:
            end.shutdown(how)
        except OSError:
            pass


def _requests(sent: list[tuple[float, bytes]]) -> Iterator[Exchange]:
    connection, exchange = h11.Connection(h11.SERVER), None
    for when, data in sent:
        connection.receive_data(data)
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                headers = [(k.decode(), v.decode()) for k, v in event.headers.raw_items()]
                target = event.target.decode()
                exchange = Exchange(event.method.decode(), target, headers, when=when)
            elif isinstance(event, h11.Data) and exchange:
                exchange.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage) and exchange:
                yield exchange
                connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                if connection.our_state is h11.MUST_CLOSE:
                    return
                connection.start_next_cycle()
            else:
                break


def _responses(answered: bytes, methods: Iterable[str]) -> Iterator[str]:
    connection = h11.Connection(h11.CLIENT)
    connection.receive_data(answered)
    for method in methods:
        connection.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        connection.send(h11.EndOfMessage())
        text = b""
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:  # the client had all it wanted, and hung up
                yield text.decode()
                return
            if isinstance(event, h11.Data):
                text += bytes(event.data)
        yield text.decode()
        if connection.their_state is h11.MUST_CLOSE:
            return
        connection.start_next_cycle()


# ---------------------------------------------------------------------- keeping


def write(
    path: Path, program: str, exchanges: list[Exchange], folder: Path, home: Path, ours: set[str]
) -> None:
    """Keep a session in a file. ``ours``: texts that are not the program's, and stay."""
    names: dict[str, str] = {}
    marks: dict[str, str] = {}
    kept, parts = [], list[str]()
    for number, exchange in enumerate(exchanges):
        body = json.loads(exchange.body or b"null")
        if exchange.body and _compact(body) != exchange.body.decode():
            raise ValueError(f"{exchange.target}: not the spelling of compact JSON")

        def neutral(text: str) -> str:
            text = text.replace(str(folder), FOLDER).replace(str(home), HOME)
            text = _ANSWERED.sub(lambda m: marks.get(m[0], m[0]), text)
            return _NAMED.sub(lambda m: names.setdefault(m[0], _name(m[0], len(names))), text)

        headers = [[k, neutral(v)] for k, v in exchange.headers]
        small = json.loads(neutral(_compact(_shortened(body, ours))))
        entry = {"method": exchange.method, "target": exchange.target, "headers": headers}
        kept.append(entry | {"body": _interned(small, parts)})
        for i, answered in enumerate(dict.fromkeys(_ANSWERED.findall(exchange.answer))):
            marks.setdefault(answered, f"«{number}.{i}»")
    data = {"program": program, "parts": [json.loads(p) for p in parts], "exchanges": kept}
    lines = [f'{{"program": {json.dumps(program)},', ' "parts": [']
    lines += [",\n".join(f"  {_compact(p)}" for p in data["parts"]), ' ], "exchanges": [']
    lines += [",\n".join(f"  {_compact(e)}" for e in kept), " ]}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _name(text: str, number: int) -> str:
    """Another name of the same form."""
    digits = f"{number + 1:x}"
    if text.startswith("ses_"):
        return "ses_" + digits.rjust(len(text) - 4, "0")
    zeros = re.sub("[0-9a-f]", "0", text)
    return zeros[: -len(digits)] + digits


def _shortened(value: Any, ours: set[str], key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _shortened(v, ours, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_shortened(v, ours, key) for v in value]
    if not isinstance(value, str) or value in ours or value.startswith("x-anthropic-"):
        return value
    if " " not in value or (key not in _ALWAYS_PROSE and len(value) <= 40) or _is_json(value):
        return value
    return f"⟦{len(json.dumps(value, ensure_ascii=False).encode()) - 2}⟧"


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _interned(value: Any, parts: list[str]) -> Any:
    """With long fields, and long entries of lists, named by their place in ``parts``."""

    def shared(item: Any) -> Any:
        text = _compact(item)
        if len(text) < _SHARED:
            return item
        if text not in parts:
            parts.append(text)
        return {"part": parts.index(text)}

    if not isinstance(value, dict):
        return value
    return {
        k: [shared(x) for x in v] if isinstance(v, list) and k in ("messages", "input")
        else shared(v)
        for k, v in value.items()
    }  # fmt: skip


# ---------------------------------------------------------------------- sending again


def replay(path: Path, port: int, *, known: bool = True) -> Iterator[tuple[Any, int, str]]:
    """Send a session again, exchange by exchange: the request's body, status and answer.

    With ``known`` False the program speaks of ids that this server never gave, as after a restart.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    given: list[list[str]] = []

    def marked(match: re.Match[str]) -> str:
        exchange, place = int(match[1]), int(match[2])
        if known:
            return given[exchange][place]
        return f"{exchange:02}_{place:026}"

    for entry in data["exchanges"]:
        body = _whole(entry["body"], data["parts"])
        text = _PROSE.sub(lambda m: _filler(int(m[1])), _compact(body))
        raw = b"" if body is None else _MARK.sub(marked, text).encode()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        target = entry["target"]
        connection.putrequest(entry["method"], target, skip_host=True, skip_accept_encoding=True)
        for name, value in entry["headers"]:
            if name.lower() == "content-length":
                value = str(len(raw))
            connection.putheader(name, f"127.0.0.1:{port}" if name.lower() == "host" else value)
        connection.endheaders(raw)
        answer = connection.getresponse()
        said = answer.read().decode()
        connection.close()
        given.append(list(dict.fromkeys(_ANSWERED.findall(said))))
        yield json.loads(raw or b"null"), answer.status, said


def _whole(value: Any, parts: list[Any]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"part"}:
            return parts[value["part"]]
        return {k: _whole(v, parts) for k, v in value.items()}
    return [_whole(v, parts) for v in value] if isinstance(value, list) else value


def _filler(size: int) -> str:
    return ("What the program says here is its own affair. " * (size // 46 + 1))[:size]

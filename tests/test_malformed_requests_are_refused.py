"""Whatever is sent, the answer is a plain one: never a 500, never a traceback."""

from __future__ import annotations

import copy
import json
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from live_server import CALL, HELLO, WEATHER, Server, wait_for
from scripted_models import ScriptedModel, one_torch_thread, small_tokenizer  # noqa: F401

from dsv4.server import LocalBackend

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/responses",
)  # fmt: skip
GOOD: dict[str, Any] = {
    "model": "x", "messages": HELLO, "prompt": "Hello", "input": HELLO, "max_tokens": 3,
    "system": [{"type": "text", "text": "a"}], "tools": [WEATHER], "temperature": 1, "top_p": 1,
    "tool_choice": "auto", "stop": ["x"], "stop_sequences": ["x"], "n": 1, "seed": 1,
    "thinking": {"type": "enabled"}, "reasoning_effort": "high", "stream": False,
    "response_format": {"type": "text"}, "reasoning": {"effort": "low"}, "logprobs": False,
    "text": {"format": {"type": "text"}}, "metadata": {"user_id": "a"}, "suffix": "b",
    "output_config": {"effort": "low"}, "stream_options": {"include_usage": True},
    "chat_template_kwargs": {"thinking": True}, "max_thinking_tokens": 5,
    "instructions": "c", "parallel_tool_calls": True, "user": "u",
}  # fmt: skip
ODD: list[Any] = [
    None, True, 0, -1, 1.5, 1e308, 10**30, -(10**30), "", "x", "\ud800", "\x00", "🐋" * 50, [], {},
    [[]], [None], [1, "a", {}], {"a": {"b": {}}}, {"type": None}, {"type": "zzz"}, {"role": 5},
    [{"role": "user"}], [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "assistant", "tool_calls": [None]}], [{"type": "function"}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": ["object", 5]}}}],
    [{"type": "function_call_output"}], [{"type": "reasoning", "content": "x"}],
    [{"role": "user", "content": [{"type": "tool_result", "content": [5, None]}]}],
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}},
    {"type": "json_schema", "json_schema": {"schema": {"pattern": "(((", "type": "string"}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    model = ScriptedModel(small_tokenizer())
    model.script = CALL
    with Server(LocalBackend(model)) as running:
        yield running


@pytest.fixture(autouse=True)
def no_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


def mutated(rng: random.Random) -> bytes:
    """A request that is a little wrong somewhere, or hopelessly."""
    body = json.loads(json.dumps(GOOD))
    for _ in range(rng.randint(1, 3)):
        place, key = body, rng.choice(list(body))
        while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.6:
            place = place[key]
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        place[key] = copy.deepcopy(rng.choice(ODD))
    raw = json.dumps(body).encode()
    kind = rng.random()
    if kind < 0.1:
        raw = raw[: rng.randrange(len(raw))]
    elif kind < 0.2:
        at = rng.randrange(len(raw))
        raw = raw[:at] + rng.randbytes(rng.randint(1, 5)) + raw[at:]
    elif kind < 0.23:
        raw = b"[" * rng.randint(1, 50_000)
    elif kind < 0.26:
        deep = rng.randint(100, 5000)
        raw = b'{"messages": ' + b'[{"content": ' * deep + b"1" + b"}]" * deep + b"}"
    elif kind < 0.28:
        raw = b'{"max_tokens": ' + b"9" * rng.randint(100, 6000) + b"}"
    return raw


@pytest.mark.slow
def test_two_thousand_malformed_requests_get_plain_answers(server: Server) -> None:
    rng = random.Random(20260424)
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for number in range(2000):
            raw = mutated(rng)
            response = client.post(PATHS[number % len(PATHS)], content=raw)
            status = response.status_code
            statuses[status] = statuses.get(status, 0) + 1
            assert status in (200, 400), (raw[:2000], response.text)
            assert "Traceback" not in response.text
            if status == 400:
                error = response.json()["error"]
                assert error["message"] and error["type"] == "invalid_request_error"
    assert statuses[400] > 1000, statuses
    wait_for(lambda: server.backend.load()["requests_running"] == 0)


def test_odd_http_is_survived(server: Server) -> None:
    """Lying lengths, bodies cut off, other encodings, other methods."""
    start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
    for raw in (
        start + b"Content-Length: 1000\r\n\r\n{",
        start + b"Content-Length: -5\r\n\r\n{}",
        start + b"Content-Length: 99999999999999\r\n\r\n{}",
        start + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        start + b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
        b"\x00\xff\xfe\r\n\r\n",
        b"POST /v1/../../etc/passwd HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
            sock.sendall(raw)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
        assert not answer or answer.split()[1][:1] == b"4", answer
        assert b"Traceback" not in answer and b" 500 " not in answer
    assert server.post({"messages": HELLO, "max_tokens": 2}).status_code == 200


def test_a_slow_sender_holds_nobody_up(server: Server) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n"
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    try:
        for sock in slow:
            sock.sendall(head + b'{"mess')
        begin = time.monotonic()
        assert server.post({"messages": HELLO, "max_tokens": 2}).status_code == 200
        assert time.monotonic() - begin < 20
    finally:
        for sock in slow:
            sock.close()


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: Counter[str] = Counter()

    @settings(
        max_examples=25, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def probe(case: Any) -> None:
        body = case.body if isinstance(case.body, dict) else None
        if body is not None:
            body["max_tokens"] = body["max_output_tokens"] = 3
            body["n"] = 1
        response = case.call(base_url=server.url, timeout=60)
        seen[case.path] += 1
        assert response.status_code < 500, (case.method, case.path, case.body, response.text)
        assert "Traceback" not in response.text

    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.method.upper() in ("GET", "POST"):
            given(case=operation.as_strategy())(probe)()
    assert all(seen[path] >= 20 for path in PATHS), seen

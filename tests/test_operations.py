"""Running a server: who gets in, what is counted and logged, and clients that behave badly."""

from __future__ import annotations

import base64
import json
import logging
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from live_server import OFF, Server
from prometheus_client.parser import text_string_to_metric_families
from scripted_models import ScriptedModel, small_tokenizer

from dsv4.errors import ConfigError
from dsv4.server import LocalBackend, create_app, gate, listen
from dsv4.server.accounts import Keys
from dsv4.server.app import Operations
from dsv4.server.backend import ChatRequest, ContentDelta, Finish, ScriptedBackend, Usage
from dsv4.server.database import MEMORY, Database
from dsv4.server.ledger import check, usage
from dsv4.server.logs import JsonLines
from dsv4.server.prices import picodollars
from dsv4.server.process import PatientProtocol, check_tls

ASK = {"messages": [{"role": "user", "content": "What is the pass-phrase of xyzzy?"}]}
ANSWER = [ContentDelta("hi"), Finish("stop", Usage(100, 20, 40))]
COST = picodollars("0.028") // 10**6 * 40 + picodollars("0.14") // 10**6 * 60
COST += picodollars("0.28") // 10**6 * 20


class Site:
    """An application on a port, its database and its keys."""

    def __init__(self, script: Any = ANSWER, **options: Any) -> None:
        self.database = Database(MEMORY)
        self.keys = Keys(self.database)
        self.backend = ScriptedBackend(script)
        self.app = create_app(self.backend, database=self.database, **options)
        self.operations: Operations = self.app.state.operations
        self._socket = listen("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app, http=PatientProtocol, log_config=None, lifespan="off",
            proxy_headers=True, forwarded_allow_ips=["127.0.0.1"],
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))

    def __enter__(self) -> Site:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        assert check(self.database) == []
        self.database.close()

    def ask(self, key: str | None = None, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        headers |= more.pop("headers", {})
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=ASK | more, headers=headers, timeout=30)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **more)

    def metrics(self) -> dict[tuple[str, ...], float]:
        text = self.get("/metrics").text
        families = text_string_to_metric_families(text)
        return {
            (s.name, *(value for _, value in sorted(s.labels.items()))): s.value
            for family in families
            for s in family.samples
        }


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """What the server logs."""
    found: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(JsonLines().format(record)))

    logger, handler = logging.getLogger("dsv4.server"), Keep()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def logged(lines: list[dict[str, Any]], count: int = 1) -> list[dict[str, Any]]:
    end = time.monotonic() + 10
    while len(lines) < count and time.monotonic() < end:
        time.sleep(0.005)
    return lines


# ---------------------------------------------------------------------- keys


def test_keys_in_both_styles_and_the_errors_clients_know(site: Site) -> None:
    assert site.ask().status_code == 200  # nobody needs a key yet
    key = site.keys.create("laptop")
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key=key, max_retries=0) as client:
        assert client.chat.completions.create(model="m", messages=ASK["messages"]).model  # type: ignore[call-overload]
    assert site.ask(headers={"x-api-key": key}).status_code == 200
    for wrong in ({}, {"authorization": "Bearer sk-wrong-and-quite-long"}, {"x-api-key": "no"}):
        answer = site.ask(headers=wrong)
        error = answer.json()["error"]
        assert answer.status_code == 401
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_request_error")
        assert error["message"].startswith("Authentication Fails")
        assert f"(request_id: {answer.headers['x-request-id']})" in error["message"]
    assert "Your api key: ****long is invalid" in site.ask("sk-wrong-and-quite-long").text
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    site.keys.revoke("laptop")
    site.keys.create("other")
    assert site.ask(key).status_code == 401


def test_limits_answer_402_and_429_in_the_hosted_words(site: Site) -> None:
    poor = site.keys.create("poor", spend_limit=COST)
    assert site.ask(poor).status_code == 200
    answer = site.ask(poor)
    assert answer.status_code == 402
    assert answer.json() == {
        "error": {
            "message": "Insufficient Balance",
            "type": "unknown_error",
            "param": None,
            "code": "invalid_request_error",
        }
    }
    slow = site.keys.create("slow", requests_per_minute=1)
    assert site.ask(slow).status_code == 200
    answer = site.ask(slow)
    assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.json()["error"]["type"] == "rate_limit_error"
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key=slow, max_retries=0) as client:
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="m", messages=ASK["messages"])  # type: ignore[call-overload]


def test_concurrency_is_counted_until_an_answer_ends() -> None:
    with Site([ContentDelta("a"), 300.0]) as site:
        key = site.keys.create("one", concurrency=1)
        headers = {"authorization": f"Bearer {key}"}

        @contextmanager
        def asking() -> Iterator[int]:
            url, body = f"{site.url}/v1/chat/completions", ASK | {"stream": True}
            with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
                lines = answer.iter_lines()  # without a name it would end, and hang up
                next(lines)
                yield answer.status_code

        with asking() as status:
            refused = site.ask(key)
            assert (status, refused.status_code) == (200, 429)
            assert refused.json()["error"]["message"].startswith("Your current concurrency is 2,")
        end = time.monotonic() + 30
        while usage(site.database, ())[0].open:
            assert time.monotonic() < end
            time.sleep(0.02)  # the server wants the database, too
        with asking() as status:
            assert status == 200


def test_a_spend_limit_shortens_the_answer_it_cannot_pay() -> None:
    with Site() as site:
        site.ask(site.keys.create("guest", spend_limit=100 * 140_000 + 7 * 280_000))
        (request,) = site.backend.requests
        assert isinstance(request, ChatRequest) and request.sampling.max_tokens == 7


def test_a_server_for_other_machines_never_opens() -> None:
    with Site(keyless=False) as site:
        assert site.ask().status_code == 401
        key = site.keys.create("only")
        assert site.ask(key).status_code == 200
        site.keys.revoke("only")
        assert site.ask().status_code == 401
    with Database(MEMORY) as database:
        keys = Keys(database)
        keys.check_exposure("127.0.0.1")
        with pytest.raises(ConfigError, match="keys create"):
            keys.check_exposure("0.0.0.0")
        keys.check_exposure("0.0.0.0", "sesame")
        keys.create("a")
        keys.check_exposure("0.0.0.0")


OPEN = {
    "HEAD /", "GET /", "GET /web/about", "GET /health", "GET /ready", "GET /openapi.json",
}  # fmt: skip


def test_with_a_key_every_other_route_asks_for_it_before_it_reads_anything() -> None:
    app = create_app(ScriptedBackend([]), api_key="sesame")

    def routes(found: Any) -> Iterator[tuple[str, str]]:
        for route in found:
            inner = getattr(route, "original_router", None)
            yield from routes(inner.routes if inner else ())
            for method in getattr(route, "methods", None) or ():
                yield method, route.path

    answered = set()
    count = 0
    with TestClient(app) as client:
        for method, path in routes(app.routes):
            count += 1
            for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "no"}):
                url = path.replace("{name:path}", "x")
                answer = client.request(method, url, headers=headers, content=b"{")
                if answer.status_code != 401:
                    answered.add(f"{method} {path}")
    assert answered == OPEN and count > 45


def test_a_page_of_another_site_gets_nothing(site: Site) -> None:
    assert site.ask(headers={"origin": "https://evil.example"}).status_code == 403
    assert site.ask(headers={"host": "evil.example"}).status_code == 403
    assert "access-control-allow-origin" not in site.get("/v1/models").headers
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = httpx.options(f"{site.url}/v1/chat/completions", headers=preflight)
    assert "access-control-allow-origin" not in answer.headers


def test_a_site_that_is_allowed_gets_cors() -> None:
    with Site(origins=["https://chat.example"]) as site:
        answer = site.ask(headers={"origin": "https://chat.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert site.ask(headers={"origin": "https://evil.example"}).status_code == 403


# ---------------------------------------------------------------------- the books


def test_every_answer_is_in_the_books_with_its_cache_hits(site: Site) -> None:
    site.ask()
    site.ask(model="deepseek-v4-pro", stream=True)
    rows = {row.model: row for row in usage(site.database)}
    flash, pro = rows["deepseek-v4-flash"], rows["deepseek-v4-pro"]
    assert (flash.hit_tokens, flash.miss_tokens, flash.output_tokens) == (40, 60, 20)
    assert flash.cost == COST == 15_120_000
    assert pro.cost == 40 * 145_000 + 60 * 1_740_000 + 20 * 3_480_000
    assert (flash.open, pro.open) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_of_several_answers_is_paid_for_once(
    lines: list[dict[str, Any]], stream: bool
) -> None:
    """What the answer says was used, the books and the log agree."""
    model = ScriptedModel(small_tokenizer())
    model.script = "Paris for 3 days"
    with Database(MEMORY) as database, Server(LocalBackend(model), database=database) as server:
        body = {"messages": [{"role": "user", "content": "weather " * 40}], "n": 3, **OFF}
        said = server.chunks(body)[-1]["usage"] if stream else server.post(body).json()["usage"]
        (row,) = usage(database, ())
        (line,) = logged(lines)
        assert check(database) == []
    used = [0, said["prompt_tokens"], said["completion_tokens"]]
    assert used[1] > 40 and used[2] % 3 == 0
    assert [said["prompt_cache_hit_tokens"], said["prompt_cache_miss_tokens"]] == used[:2]
    assert [row.hit_tokens, row.miss_tokens, row.output_tokens, row.requests] == [*used, 1]
    assert [line[f"{kind}_tokens"] for kind in ("hit", "miss", "output")] == used
    assert picodollars(line["cost_usd"]) == row.cost == used[1] * 140_000 + used[2] * 280_000


def test_an_answer_is_in_the_books_before_its_end_is_seen() -> None:
    with Site([ContentDelta("a"), Finish("stop", Usage(10, 5, 0)), 5.0]) as site:
        url = f"{site.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=ASK | {"stream": True}) as answer:
            for line in answer.iter_lines():
                if '"usage"' in line:
                    break
            (row,) = usage(site.database)
        assert (row.requests, row.output_tokens, row.open) == (1, 5, 0)


def test_a_failed_answer_is_closed_in_the_books() -> None:
    with Site([ContentDelta("a"), RuntimeError("boom")]) as site:
        assert site.ask().status_code == 500
        (row,) = usage(site.database)
        assert (row.requests, row.cost, row.open) == (1, 0, 0)


def test_the_balance_is_exact_and_in_strings(site: Site) -> None:
    key = site.keys.create("guest", spend_limit=picodollars("1.5"))
    site.ask(key)
    headers = {"authorization": f"Bearer {key}"}
    answer = site.get("/user/balance", headers=headers).json()
    (info,) = answer["balance_infos"]
    assert answer["is_available"] is True and info["currency"] == "USD"
    assert Decimal(info["total_balance"]) == Decimal("1.5") - Decimal(COST) / 10**12
    assert info["topped_up_balance"] == info["total_balance"] == "1.49998488"
    site.keys.limit("guest", spend_limit=1)
    answer = site.get("/user/balance", headers=headers).json()
    assert answer["is_available"] is False
    assert answer["balance_infos"][0]["total_balance"] == "0.00"
    unlimited = site.keys.create("unlimited")
    answer = site.get("/user/balance", headers={"x-api-key": unlimited}).json()
    assert answer["is_available"] is True


def test_the_usage_page_shows_a_key_its_own_and_needs_no_script(site: Site) -> None:
    site.ask()
    page = site.get("/usage")
    assert "deepseek-v4-flash" in page.text and "0.00001512" in page.text and "local" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    key = site.keys.create("guest")
    locked = site.get("/usage")
    assert locked.status_code == 401 and locked.headers["www-authenticate"].startswith("Basic")
    login = base64.b64encode(f"anyone:{key}".encode()).decode()
    own = site.get("/usage", headers={"authorization": f"Basic {login}"})
    assert own.status_code == 200 and "Nothing was asked yet" in own.text
    site.ask(key)
    report = site.get("/usage.json", headers={"x-api-key": key}).json()
    assert report["total"]["requests"] == 1 and report["usage"][0]["caller"] == "guest"


# ---------------------------------------------------------------------- watching it


def test_metrics_count_requests_tokens_and_costs(site: Site) -> None:
    site.ask()
    site.ask(stream=True)
    site.get("/nowhere")
    seen = site.metrics()
    flash = "deepseek-v4-flash"
    route = "/v1/chat/completions"
    assert seen["dsv4_http_requests_total", "POST", route, "200"] == 2
    assert seen["dsv4_http_requests_total", "GET", "none", "404"] == 1
    assert seen["dsv4_tokens_total", "hit", flash] == 80
    assert seen["dsv4_tokens_total", "miss", flash] == 120
    assert seen["dsv4_tokens_total", "output", flash] == 40
    assert seen["dsv4_cost_usd_total", flash] == pytest.approx(2 * COST / 1e12)
    assert seen["dsv4_answers_total", flash, "stop"] == 2
    assert seen["dsv4_http_requests_open",] == 1  # this one
    assert seen["process_resident_memory_bytes",] > 10**7
    site.keys.create("a")
    assert site.get("/metrics").status_code == 401


def test_logs_have_facts_and_no_prompt(lines: list[dict[str, Any]], site: Site) -> None:
    answer = site.ask(headers={"x-request-id": "my-own-id-17"})
    site.ask(messages=[{"role": "xyzzy", "content": "xyzzy"}])
    httpx.post(f"{site.url}/v1/chat/completions", content=b'{"xyzzy')
    assert answer.headers["x-request-id"] == "my-own-id-17"
    first, second, _ = logged(lines, 3)
    assert first.pop("seconds") >= 0 and first.pop("time").endswith("Z")
    assert first == {
        "level": "info", "event": "request", "request_id": "my-own-id-17", "method": "POST",
        "route": "/v1/chat/completions", "status": 200, "caller": "local", "client": "127.0.0.1",
        "model": "deepseek-v4-flash", "served": "scripted", "outcome": "stop", "hit_tokens": 40,
        "miss_tokens": 60, "output_tokens": 20, "cost_usd": "0.00001512",
    }  # fmt: skip
    assert second["status"] == 400 and len(second["request_id"]) == 32
    assert "xyzzy" not in json.dumps(lines)


def test_prompts_are_logged_when_asked_for(lines: list[dict[str, Any]]) -> None:
    with Site(log_prompts=True) as site:
        site.ask()
    assert [line["event"] for line in lines] == ["prompt", "request"]
    assert "xyzzy" in json.dumps(lines[0])


def test_a_failure_is_logged_with_its_request(lines: list[dict[str, Any]]) -> None:
    with Site([RuntimeError("boom")]) as site:
        answer = site.ask()
    assert answer.status_code == 500 and "boom" not in answer.text
    (line,) = logged(lines)
    assert line["level"] == "error" and "RuntimeError: boom" in line["traceback"]
    assert line["request_id"] == answer.headers["x-request-id"] and line["status"] == 500


@pytest.mark.parametrize("given", ["short", "x" * 65, "evil\tid-123", "id with spaces"])
def test_a_strange_request_id_is_replaced(site: Site, given: str) -> None:
    answer = site.get("/health", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] != given


def test_a_proxy_is_believed_about_who_asks(lines: list[dict[str, Any]], site: Site) -> None:
    site.get("/health", headers={"x-forwarded-for": "203.0.113.9"})
    assert logged(lines)[0]["client"] == "203.0.113.9"


def test_ready_follows_the_database_and_health_does_not(site: Site) -> None:
    assert site.get("/ready").json() == {"status": "ready"}
    site.operations.gate.draining = True
    refused = site.ask()
    assert site.get("/ready").status_code == refused.status_code == 503
    assert refused.headers["retry-after"] == "1" and site.get("/health").status_code == 200
    site.operations.gate.draining = False
    assert site.ask().status_code == 200


# ---------------------------------------------------------------------- bad clients


@contextmanager
def raw(site: Site, text: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", site.port), timeout=20) as connection:
        connection.sendall(text)
        yield connection


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    text = b""
    while chunk := connection.recv(65536):
        text += chunk
    return text


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"


def test_who_says_nothing_or_half_a_head_is_let_go(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4.server.process.HEAD_PAUSE", 0.3)
    for text in (b"", b"GET /health HTTP/1.1\r\nHo"):
        with raw(site, text) as connection:
            start = time.monotonic()
            assert received(connection) == b""
            assert time.monotonic() - start > 0.2
    with raw(site, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as connection:
        time.sleep(0.5)  # the connection is kept: this client has said what it wants
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert received(connection).count(b"200 OK") == 2


def test_who_pauses_in_the_body_gets_408(site: Site) -> None:
    site.operations.gate.send_pause = 0.3
    with raw(site, HEAD % 100 + b'{"messages"') as connection:
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408") and b"did not come" in answer


def test_who_hangs_up_in_the_body_is_no_failure(lines: list[dict[str, Any]], site: Site) -> None:
    with raw(site, HEAD % 100 + b'{"messages"'):
        pass
    (line,) = logged(lines)
    assert (line["status"], line["level"]) == (400, "info")


def test_bodies_are_limited_one_by_one_and_together(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4.server.wire.MAX_BODY", 1000)
    with raw(site, HEAD % 1001 + b"{") as connection:  # refused before it is sent
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 413") and b"too large" in answer
    chunked = HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")
    with raw(site, chunked + b"400\r\n" + b" " * 1024 + b"\r\n") as connection:
        assert received(connection).startswith(b"HTTP/1.1 413")
    monkeypatch.setattr(gate, "MAX_HELD", 2)
    with raw(site, HEAD % 990 + b" " * 900), raw(site, HEAD % 990 + b" " * 900):
        end = time.monotonic() + 10
        while site.metrics()["dsv4_http_bodies_bytes",] < 1800:
            assert time.monotonic() < end
        with raw(site, HEAD % 990 + b" " * 900) as third:
            answer = received(third)
    assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After" in answer.title()
    end = time.monotonic() + 10
    while site.metrics()["dsv4_http_bodies_bytes",] > 0:
        assert time.monotonic() < end


def test_too_many_open_requests_are_told_to_come_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MAX_OPEN", 1)
    with raw(site, HEAD % 100 + b"{"):
        end = time.monotonic() + 10
        while (answer := site.ask()).status_code != 503:
            assert time.monotonic() < end
    assert answer.headers["retry-after"] == "1" and site.get("/health").status_code == 200


def test_who_does_not_read_is_let_go(lines: list[dict[str, Any]]) -> None:
    script = [*[ContentDelta("x" * 100_000)] * 200, Finish("stop", Usage(1, 1))]
    with Site(script) as site:
        site.operations.gate.read_pause = 0.5
        body = json.dumps(ASK | {"stream": True}).encode()
        with raw(site, HEAD % len(body) + body):
            (line,) = logged(lines)
        assert line["outcome"] == "stalled" and site.backend.closed_early
        (row,) = usage(site.database)
        assert row.open == 0


# ---------------------------------------------------------------------- TLS


def test_tls_files_are_checked_before_anything_else(tmp_path: Path) -> None:
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    check_tls(cert, key)
    check_tls(None, None)
    for wrong in ((cert, cert), (None, key), (cert, str(tmp_path / "none"))):
        with pytest.raises(ConfigError, match="TLS"):
            check_tls(*wrong)
    with Database(MEMORY) as database:
        app = create_app(ScriptedBackend(ANSWER), database=database)
        config = uvicorn.Config(
            app, http=PatientProtocol, log_config=None, lifespan="off", ssl_certfile=cert,
            ssl_keyfile=key,
        )  # fmt: skip
        server, sock = uvicorn.Server(config), listen("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        trust = ssl.create_default_context(cafile=cert)
        url = f"https://127.0.0.1:{sock.getsockname()[1]}"
        answer = httpx.post(f"{url}/v1/chat/completions", json=ASK, verify=trust)
        server.should_exit = True
        thread.join(20)
    assert answer.status_code == 200

"""``dsv4 bench soak``: a real server under full load, for as long as you like.

``dsv4 serve`` runs in a process of its own, with a small cache, so that it is full early. USERS ask
without a pause: the same seeded questions again and again, short and long, greedy and sampled,
streamed or not, continued and edited, and between them ones that nobody asked before and ones that
are hung up on. Then:

    drift      the same seeded question had the same answer every time
    growth     of the server's memory, from the end of the warm-up (WARM of the time) to the end
    running    requests that the server still computes when all have gone
    problems   what ``dsv4 usage --check`` finds in its books
    exit       of the server after SIGTERM
"""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx

from . import __version__
from .errors import DSV4Error

Report = dict[str, Any]
QUESTIONS, WARM, NEW_OF, HUNG_UP_OF = 24, 0.25, 6, 9  # every 6th is new, every 9th hung up on
CACHE_GB = 0.05
START, STOP = 300.0, 60.0  # seconds
WORDS = "stone river seven blue under count every light table green walk often north small".split()


def run(
    model: str = "v4-nano",
    *,
    minutes: float = 30.0,
    users: int = 12,
    threads: int | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Load a server of ``model`` (a name or a folder) for ``minutes``.

    Returns the receipt, whose ``ok`` says whether all was as it should be: no drift, memory grown
    by at most 1%, nothing running, balanced books, no failures, a clean exit. Raises DSV4Error when
    the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="dsv4-soak-") as scratch:
        database = f"sqlite:///{scratch}/dsv4.db"
        with _server(model, Path(scratch), database, threads) as (process, url):
            load = _Load(url, users)
            memory = _watch(load, process, 60 * minutes, say)
            with httpx.Client(base_url=url, timeout=30) as client:
                running = _settled(client)
            process.send_signal(signal.SIGTERM)
            code = process.wait(STOP)
        checked = subprocess.run(
            [sys.executable, "-m", "dsv4.cli", "usage", "--by", "total", "--check", "--json",
             "--database", database],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        books = json.loads(checked.stdout or "{}")
    seconds = memory[-1][0]
    warm = [size for at, size in memory if at >= WARM * seconds]
    some = max(1, len(warm) // 10)
    first, last = statistics.median(warm[:some]), statistics.median(warm[-some:])
    report: Report = {
        "dsv4": __version__, "model": model,
        "settings": {"minutes": minutes, "users": users, "cache_gb": CACHE_GB},
        "answers": dict(load.done), "tokens": load.tokens, "drift": load.drift,
        "asked_again": load.again, "failures": load.failures,
        "memory": [[round(at, 1), size] for at, size in memory[:: max(1, len(memory) // 60)]],
        "warm_bytes": int(first), "end_bytes": int(last), "growth": last / first - 1,
        "running": running, "problems": books.get("problems", [checked.stderr]),
        "total": books.get("total"), "exit": code,
    }  # fmt: skip
    bad = (*load.drift, *load.failures, *report["problems"], running, code)
    report["ok"] = not any(bad) and report["growth"] <= 0.01 and load.again > 0
    return report


@contextmanager
def _server(
    model: str, scratch: Path, database: str, threads: int | None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "dsv4.cli", "serve", model, "--port", str(port), "--database",
        database, "--cache-gb", str(CACHE_GB), "--cache-dir", str(scratch / "cache"),
        "--cache-dir-gb", "0.5", "--no-log", *(("--threads", str(threads)) if threads else ()),
    ]  # fmt: skip
    log = scratch / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START
    try:
        while True:
            try:
                if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > end:
                raise DSV4Error("the server does not start", got=log.read_text()[-2000:])
            time.sleep(0.1)
        yield process, url
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _watch(
    load: _Load, process: subprocess.Popen[bytes], seconds: float, say: Callable[[str], object]
) -> list[tuple[float, int]]:
    """The server's memory over time, while it is under load."""
    memory = []
    start = time.monotonic()
    load.begin()
    try:
        while (at := time.monotonic() - start) < seconds and process.poll() is None:
            memory.append((at, resident(process.pid)))
            say(f"{at:,.0f} of {seconds:,.0f} s: {sum(load.done.values()):,} answers, "
                f"{memory[-1][1] / 1e6:,.0f} MB, {len(load.drift)} drifted")  # fmt: skip
            time.sleep(min(1.0, seconds / 60))
    finally:
        load.end()
    return memory


def resident(pid: int) -> int:
    """Bytes of a process in memory, but for pages of files."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise DSV4Error("memory of a process", expected="Linux", got=sys.platform)


def _settled(client: httpx.Client) -> int:
    """Requests that still run or wait when there was time for them to end."""
    for _ in range(100):
        health = client.get("/health").json()
        busy = int(health["requests_running"] + health["requests_waiting"])
        if not busy:
            break
        time.sleep(0.1)
    return busy


class _Load:
    """Users who ask without a pause, and what they saw."""

    def __init__(self, url: str, users: int) -> None:
        self.done: Counter[str] = Counter()
        self.tokens = self.again = 0
        self.drift: list[str] = []
        self.failures: list[str] = []
        self._url, self._lock, self._stop = url, threading.Lock(), threading.Event()
        self._answers: dict[int, str] = {}
        self._threads = [threading.Thread(target=self._user, args=(i,)) for i in range(users)]

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """No more questions; waits for the answers that are coming."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _user(self, number: int) -> None:
        random, asked = Random(number), 0
        with httpx.Client(base_url=self._url, timeout=600) as client:
            while not self._stop.is_set():
                asked += 1
                try:
                    if asked % HUNG_UP_OF == 0:
                        self._hang_up(client, random)
                    elif asked % NEW_OF == 0:
                        self._ask(client, question(random.randrange(1 << 40, 1 << 41)), None)
                    else:
                        which = random.randrange(QUESTIONS)
                        self._ask(client, question(which), which)
                except Exception as error:
                    with self._lock:
                        self.failures.append(repr(error)[:200])

    def _ask(self, client: httpx.Client, body: Report, which: int | None) -> None:
        if body.get("stream"):
            said, tokens = _streamed(client, body)
        else:
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            said = [answer["choices"][0]["message"], answer["choices"][0]["finish_reason"]]
            tokens = answer["usage"]["total_tokens"]
        mark = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        with self._lock:
            self.tokens += tokens
            self.done["new" if which is None else "known"] += 1
            if which is None:
                return
            self.again += which in self._answers
            if self._answers.setdefault(which, mark) != mark:
                self.drift.append(f"question {which}: {said!r}"[:500])

    def _hang_up(self, client: httpx.Client, random: Random) -> None:
        body = question(random.randrange(QUESTIONS)) | {"stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            for _ in response.iter_lines():
                break
        with self._lock:
            self.done["hung up"] += 1


def _streamed(client: httpx.Client, body: Report) -> tuple[list[Any], int]:
    """The pieces of a streamed answer put together, and its tokens."""
    pieces: dict[str, str] = {}
    reason, tokens = None, 0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            choice = chunk["choices"][0]
            for key, value in choice["delta"].items():
                if isinstance(value, str):
                    pieces[key] = pieces.get(key, "") + value
            reason = choice["finish_reason"] or reason
            tokens = (chunk.get("usage") or {}).get("total_tokens", tokens)
    return [pieces, reason], tokens


def question(number: int) -> Report:
    """A request that depends on its number alone."""
    random = Random(number)
    length = random.choice((5, 30, 200, 900))
    text = " ".join(random.choices(WORDS, k=length))
    messages = [{"role": "user", "content": text}]
    if number % 3 == 0:  # goes on from another one, edited
        messages = [
            {"role": "user", "content": text + "."},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": random.choice(WORDS)},
        ]
    return {
        "model": "deepseek-v4-flash", "messages": messages, "seed": number % (1 << 31),
        "temperature": random.choice((0.0, 0.7, 1.0)), "max_tokens": random.choice((8, 32, 96)),
        "stream": number % 2 == 0,
        "thinking": {"type": "enabled" if number % 4 == 1 else "disabled"},
    }  # fmt: skip


"""What a server does not survive its books do; and no client can leave work or memory behind.

The tests run for seconds. With DSV4_FULL=1 they run for a minute each.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from served_process import kill, serving
from sqlalchemy import select

from dsv4.server.accounts import Account, Keys, now
from dsv4.server.database import Database
from dsv4.server.ledger import Charge, Ledger, check, usage
from dsv4.server.prices import PICO, PriceList

FULL = bool(os.environ.get("DSV4_FULL"))
ROUNDS = 60 if FULL else 4
SECONDS = 60.0 if FULL else 4.0
CLIENTS = 64
LEAK = 20 << 20  # bytes
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello"}],
    "thinking": {"type": "disabled"},
}


class Customer(threading.Thread):
    """Asks one thing after another until the server is gone; remembers what was answered whole."""

    def __init__(self, url: str, key: str, name: str, seed: int) -> None:
        super().__init__()
        self._url, self._key, self._name, self._random = url, key, name, random.Random(seed)
        self.answered: dict[str, dict[str, int]] = {}  # usage by request id

    def run(self) -> None:
        with httpx.Client(timeout=20) as client:
            for i in range(10_000):
                headers = {"x-api-key": self._key, "x-request-id": f"{self._name}.request-{i}"}
                body = ASK | {"stream": True, "max_tokens": self._random.randint(1, 60)}
                url = f"{self._url}/v1/chat/completions"
                try:
                    with client.stream("POST", url, json=body, headers=headers) as answer:
                        assert answer.status_code == 200
                        for line in answer.iter_lines():
                            if '"usage":{' in line:
                                data = json.loads(line.removeprefix("data: "))
                                self.answered[headers["x-request-id"]] = data["usage"]
                except httpx.TransportError:
                    return


def test_kill_9_at_any_moment_leaves_books_that_balance(tmp_path: Path) -> None:
    """And every answer whose end a client saw is in them, with the tokens that the client saw."""
    url = f"sqlite:///{tmp_path}/books.db"
    with Database(url) as database:
        key = Keys(database).create("customer", spend_limit=10 * PICO)
        seen: dict[str, dict[str, int]] = {}
        dice = random.Random(5)
        for i in range(ROUNDS):
            with serving(url, "word " * 50) as (process, address):
                customers = [Customer(address, key, f"r{i}c{c}", c) for c in range(4)]
                for customer in customers:
                    customer.start()
                time.sleep(dice.uniform(0.2, 1.2))
                kill(process)
                for customer in customers:
                    customer.join(60)
                    assert not customer.is_alive()
                    seen |= customer.answered
            assert check(database) == []  # with reservations that nobody will settle
        # another server notices that those are dead
        ledger = Ledger(database, PriceList(), lambda: now() + timedelta(hours=1))
        ledger.beat()
        ledger.end()
        assert check(database) == []
        with database.read() as session:
            (account,) = session.scalars(select(Account).where(Account.name == "customer"))
            charges = {c.request: c for c in session.scalars(select(Charge))}
        assert account.reserved == 0
        assert account.spent == sum(c.cost for c in charges.values())
        assert seen, "no answer was ever finished: the test is too impatient"
        for request, told in seen.items():
            charge = charges[request]
            assert charge.outcome in ("stop", "length")
            assert charge.hit_tokens == told["prompt_cache_hit_tokens"]
            assert charge.miss_tokens == told["prompt_cache_miss_tokens"]
            assert charge.output_tokens == told["completion_tokens"]
        lost = [c for c in charges.values() if c.outcome == "lost"]
        assert all(c.cost == 0 and c.request not in seen for c in lost)
        print(f"{len(charges)} charges, {len(seen)} seen whole, {len(lost)} lost to the kill")


async def visitor(port: int, seed: int, end: float) -> dict[str, int]:
    """Behaves at random: hangs up before, during or after what it asked for, or reads it all."""
    dice = random.Random(seed)
    did = {"asked": 0, "read": 0}
    while time.monotonic() < end:
        body = json.dumps(
            ASK | {"stream": dice.random() < 0.6, "max_tokens": dice.choice([1, 5, 50, 400])}
        ).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            continue
        try:
            whim = dice.random()
            if whim < 0.1:
                request = request[: dice.randrange(len(request))]
            writer.write(request)
            await writer.drain()
            did["asked"] += 1
            if whim < 0.5:
                await asyncio.sleep(dice.uniform(0, 0.4))
            elif whim < 0.7:
                await asyncio.wait_for(reader.read(dice.randrange(1, 2000)), 20)
            else:
                text = await asyncio.wait_for(reader.read(), 60)
                assert text.split(b" ", 2)[1] in (b"200", b"429"), text[:200]
                did["read"] += 1
        except OSError:
            pass
        finally:
            if dice.random() < 0.5:
                writer.transport.abort()  # a reset in place of a goodbye
            writer.close()
    return did


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see memory")
def test_random_clients_leave_no_work_no_memory_and_balanced_books(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/books.db"
    with Database(url) as database, serving(url, "word " * 300, running=16) as (process, address):
        port = int(address.rpartition(":")[2])
        statm = Path(f"/proc/{process.pid}/statm")

        def memory() -> int:
            return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        async def storm(seconds: float, seed: int) -> list[dict[str, int]]:
            end = time.monotonic() + seconds
            return await asyncio.gather(*(visitor(port, seed + i, end) for i in range(CLIENTS)))

        def settled() -> None:
            end = time.monotonic() + 60
            while True:
                health = httpx.get(f"{address}/health", timeout=30).json()
                open_ = sum(row.open for row in usage(database, ()))
                if not (health["requests_running"] or health["requests_waiting"] or open_):
                    return
                assert time.monotonic() < end, (health, open_)
                time.sleep(0.1)

        asyncio.run(storm(SECONDS / 4, 1000))  # so that caches and pools are filled
        settled()
        before = memory()
        did = asyncio.run(storm(SECONDS, 0))
        settled()
        grown = memory() - before
        asked, read = (sum(d[name] for d in did) for name in ("asked", "read"))
        print(f"{asked} requests, {read} read to the end, memory grew by {grown / 2**20:.1f} MB")
        assert asked > CLIENTS and read > 0
        assert grown < LEAK
        assert check(database) == []
        process.terminate()  # an orderly end
        process.join(60)
        assert process.exitcode == 0
        with database.read() as session:
            outcomes = set(session.scalars(select(Charge.outcome)))
        assert outcomes <= {"stop", "length", "cancelled", "refused"}

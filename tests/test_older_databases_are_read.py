"""What a server stored, later versions read: keys, books and conversations outlive an upgrade.

``recordings/database-N.sql`` was written by a server of schema N. ``python
tests/test_older_databases_are_read.py`` writes it for the present one: once, when SCHEMA is raised.
"""

from __future__ import annotations

import asyncio
import sqlite3
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Connection, text

from dsv4.errors import ConfigError
from dsv4.server import conversations, database, ledger
from dsv4.server.accounts import Caller, Keys
from dsv4.server.database import SCHEMA, Database
from dsv4.server.models import FLASH
from dsv4.server.prices import PriceList

RECORDINGS = Path(__file__).parent / "recordings"
NOON = datetime(2026, 5, 1, 12, tzinfo=timezone.utc)
KEY = "sk-" + "k" * 43


def recorded(version: int) -> Path:
    return RECORDINGS / f"database-{version}.sql"


@pytest.fixture(params=range(1, SCHEMA + 1))
def older(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database as each version left it."""
    path = tmp_path / "dsv4.db"
    with sqlite3.connect(path) as file:
        file.executescript(recorded(request.param).read_text(encoding="utf-8"))
    file.close()
    return f"sqlite:///{path}"


def layout(file: sqlite3.Connection) -> dict[str, str]:
    """Every table and index, by name; white space and what tests declare do not count."""
    rows = file.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: " ".join(sql.split()) for name, sql in rows if "test_" not in name}


def test_tables_change_only_with_their_version(tmp_path: Path) -> None:
    """If this fails, a table is not as servers of this SCHEMA made it: raise it, and say in
    UPGRADES how the older table becomes the new one."""
    Database(f"sqlite:///{tmp_path / 'new.db'}").close()
    with sqlite3.connect(tmp_path / "new.db") as new, sqlite3.connect(":memory:") as known:
        known.executescript(recorded(SCHEMA).read_text(encoding="utf-8"))
        was, now = layout(known), layout(new)
        assert {name: now.get(name) for name in was} == was
    new.close()
    known.close()


def read(stored: Database) -> None:
    keys = Keys(stored, lambda: NOON)
    caller = keys.recognise(
        {"authorization": f"Bearer {KEY}"}, also=None, keyless=False, request_id="r"
    )
    assert caller is not None and caller.name == "laptop" and caller.limited
    (row,) = ledger.usage(stored, by=("caller",))
    assert (row.hit_tokens, row.miss_tokens, row.output_tokens) == (40, 60, 7)
    assert row.cost == 40 * 28_000 + 60 * 140_000 + 7 * 280_000
    assert ledger.check(stored) == []
    whole = asyncio.run(conversations.Conversations(stored).one("local", "c1"))
    assert whole["title"] == "Greeting" and [m["content"] for m in whole["messages"]] == ["Hello"]


def test_what_each_version_stored_is_read(older: str) -> None:
    for _ in range(2):  # as it was, and once it is up to date
        with Database(older) as stored:
            read(stored)


def test_an_upgrade_changes_tables_and_keeps_their_rows(
    older: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wider(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE account ADD COLUMN note VARCHAR DEFAULT 'none'"))

    Database(older).close()
    monkeypatch.setattr(database, "SCHEMA", SCHEMA + 1)
    monkeypatch.setitem(database.UPGRADES, SCHEMA, wider)
    for _ in range(2):  # the second time there is nothing left to do
        with Database(older) as stored, stored.read() as session:
            notes = session.execute(text("SELECT note FROM account")).scalars()
            assert set(notes) == {"none"}
    with Database(older) as stored:
        read(stored)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=f"version {SCHEMA + 1}"):  # by the version before
        Database(older)


def test_an_upgrade_that_fails_leaves_all_as_it_was(
    older: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE account ADD COLUMN note VARCHAR"))
        connection.execute(text("DELETE FROM charge"))
        connection.execute(text("ALTER TABLE nothing ADD COLUMN note VARCHAR"))

    Database(older).close()
    with monkeypatch.context() as patch:
        patch.setattr(database, "SCHEMA", SCHEMA + 1)
        patch.setitem(database.UPGRADES, SCHEMA, broken)
        with pytest.raises(ConfigError, match="nothing"):
            Database(older)
    with Database(older) as stored:
        read(stored)
        with stored.read() as session:
            columns = sqlalchemy.inspect(session.connection()).get_columns("account")
            assert "note" not in [c["name"] for c in columns]


def write(path: Path) -> None:
    """A database with something in every table, as text."""
    url = f"sqlite:///{path.with_suffix('.db')}"
    with Database(url) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr("secrets.token_urlsafe", lambda size: "k" * 43)
        keys = Keys(made, lambda: NOON)
        keys.create("laptop", spend_limit=10**12)
        (key,) = keys.list()
        books = ledger.Ledger(made, PriceList(), lambda: NOON)
        asked: Any = {"model": FLASH, "served": "v4-nano", "prompt_tokens": 100}
        opened = books.reserve(Caller(key.id, key.name, True), request="r1", **asked)
        books.settle(opened.charge, hit=40, miss=60, output=7, outcome="stop")
        page = conversations.Conversations(made, lambda: NOON)
        body = conversations.MessageBody(role="user", content="Hello", title="Greeting")
        asyncio.run(page.put_message("local", "c1", "m1", body))
    with sqlite3.connect(path.with_suffix(".db")) as file:
        path.write_text("\n".join(file.iterdump()) + "\n", encoding="utf-8")
    file.close()
    for left in path.parent.glob(f"{path.stem}.db*"):
        left.unlink()


if __name__ == "__main__":
    write(recorded(SCHEMA))

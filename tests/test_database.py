"""The server's database: private, versioned, shared by threads and processes, any SQL server."""

from __future__ import annotations

import asyncio
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from databases import database, database_url, postgres  # noqa: F401
from sqlalchemy import select
from sqlalchemy.orm import Mapped, Session, mapped_column

from dsv4.errors import ConfigError
from dsv4.server.database import MEMORY, Base, Database, SchemaVersion, Timestamp, default_url


class Counter(Base):
    __tablename__ = "test_counter"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(default=0)
    seen: Mapped[datetime | None] = mapped_column(Timestamp)


def test_times_come_back_as_they_were(database: Database) -> None:  # noqa: F811
    east = timezone(timedelta(hours=8))
    noon = datetime(2026, 4, 24, 12, 0, 0, 123456, tzinfo=east)
    with database.write() as session:
        session.add(Counter(name="a", seen=noon))
    with database.read() as session:
        seen = session.scalars(select(Counter)).one().seen
    assert seen == noon and seen is not None and seen.utcoffset() == timedelta(0)


def test_what_fails_leaves_nothing_behind(database: Database) -> None:  # noqa: F811
    with pytest.raises(RuntimeError), database.write() as session:
        session.add(Counter(name="a"))
        session.flush()
        raise RuntimeError
    with database.read() as session:
        assert session.scalars(select(Counter)).all() == []


def test_two_writers_lose_no_update(database: Database) -> None:  # noqa: F811
    with database.write() as session:
        session.add(Counter(name="a"))

    def count(_: int) -> None:
        with database.write() as session:
            row = session.scalars(select(Counter).with_for_update()).one()
            row.value += 1

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(count, range(40)))
    with database.read() as session:
        assert session.scalars(select(Counter.value)).one() == 40


def test_a_reader_does_not_wait_for_a_writer(database: Database) -> None:  # noqa: F811
    with database.write() as writer:
        writer.add(Counter(name="a"))
        writer.flush()
        with ThreadPoolExecutor(1) as threads:

            def look() -> int:
                with database.read() as session:
                    return len(session.scalars(select(Counter)).all())

            assert threads.submit(look).result(5) == 0


def test_work_goes_on_when_its_caller_is_cancelled(database: Database) -> None:  # noqa: F811
    begun, go = threading.Event(), threading.Event()

    def work(session: Session) -> None:
        begun.set()
        assert go.wait(10)
        session.add(Counter(name="a"))

    async def main() -> None:
        task = asyncio.create_task(database.run(work, write=True))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()

    asyncio.run(main())  # which waits for its threads
    with database.read() as session:
        assert session.get(Counter, "a") is not None


def test_no_writer_of_many_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4.server.database.PATIENCE", 0.1)
    with Database(f"sqlite:///{tmp_path}/busy.db") as database:  # noqa: F811
        with database.write() as session:
            session.add(Counter(name="a"))

        def count(_: int) -> None:
            with database.write() as session:
                session.scalars(select(Counter)).one().value += 1
                session.flush()
                time.sleep(0.02)  # so that those behind wait longer than they have patience

        with ThreadPoolExecutor(24) as threads:
            list(threads.map(count, range(48)))
        with database.read() as session:
            assert session.scalars(select(Counter.value)).one() == 48


def test_tables_stay_and_many_can_open_at_once(database_url: str) -> None:  # noqa: F811
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(Database, [database_url] * 4))
    with opened[0].write() as session:
        session.add(Counter(name="a"))
    for each in opened:
        each.close()
    with Database(database_url) as again, again.read() as session:
        assert session.get(Counter, "a") is not None


def test_tables_of_another_version_are_refused(database_url: str) -> None:  # noqa: F811
    with Database(database_url) as first, first.write() as session:
        session.scalars(select(SchemaVersion)).one().version = 99
    with pytest.raises(ConfigError, match="version 99"):
        Database(database_url)


def test_a_database_in_memory_is_shared_by_threads() -> None:
    with Database(MEMORY) as database, ThreadPoolExecutor(4) as threads:  # noqa: F811

        def add(name: str) -> None:
            with database.write() as session:
                session.add(Counter(name=name))

        list(threads.map(add, "abcdefgh"))
        with database.read() as session:
            assert len(session.scalars(select(Counter)).all()) == 8


def test_nobody_else_can_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "dsv4.db"
    with Database(f"sqlite:///{path}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "no URL of a database"),
        ("nosuch://x", "no URL of a database"),
        ("mysql://me@127.0.0.1/x", "driver of this database is not installed"),
        ("postgresql://me:secret@127.0.0.1:1/x", "cannot use the database"),
        ("sqlite:////proc/nothing/here.db", "cannot use the database"),
        ("sqlite:///{tmp}/text", "not a database"),
    ],
)
def test_what_cannot_be_a_database_is_refused(url: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database at all, but long enough to be looked at\n" * 20)
    with pytest.raises(ConfigError, match=message) as refused:
        Database(url.format(tmp=tmp_path))
    assert "secret" not in str(refused.value)


def test_the_place_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DSV4_DATABASE", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_url().startswith(f"sqlite:///{tmp_path}") and default_url().endswith("dsv4.db")
    monkeypatch.setenv("DSV4_DATABASE", MEMORY)
    assert default_url() == MEMORY

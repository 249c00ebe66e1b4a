"""The server's database: where it is, how its tables come to be, and how to use it.

A module that stores something declares its tables as subclasses of ``Base`` and receives a
``Database``:

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        owner: Mapped[str] = mapped_column(index=True)      # who it belongs to
        made: Mapped[datetime] = mapped_column(Timestamp)

    with database.write() as session:                       # in a thread
        session.add(Note(owner=owner, made=now))
    notes = await database.run(lambda session: session.scalars(select(Note)).all())   # in asyncio

What belongs to a caller has the caller's id as ``owner``: the id of the key that was sent, or
``LOCAL`` for a caller who needs none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
import sqlalchemy
from sqlalchemy import URL, Dialect, Engine, MetaData, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import QueuePool
from sqlalchemy.types import DateTime, TypeDecorator

from ..errors import ConfigError

MEMORY = "sqlite://"  # lives as long as its Database
LOCAL = "local"  # the owner of what callers without a key make
SCHEMA = 1  # raise it when a table that exists changes, and say how in UPGRADES
PATIENCE = 30.0  # seconds to wait for a writer of another process

T = TypeVar("T")
# How tables of a version become those of the next. All steps are one transaction, in which new
# tables have not been made yet; a new table needs no step.
UPGRADES: dict[int, Callable[[sqlalchemy.Connection], None]] = {}


class Timestamp(TypeDecorator[datetime]):
    """An aware datetime, kept as UTC in every database."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(timezone.utc).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=timezone.utc)


class Base(DeclarativeBase):
    """Every table of the server. Constraints are named the same in every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class SchemaVersion(Base):
    """One row: the version of the tables, so that another version's data is not misread."""

    __tablename__ = "schema_version"
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


def default_url() -> str:
    """``DSV4_DATABASE``, or a SQLite file in the user's data folder (on Linux
    ~/.local/share/dsv4/dsv4.db)."""
    return os.environ.get("DSV4_DATABASE") or "sqlite:///" + str(
        platformdirs.user_data_path("dsv4") / "dsv4.db"
    )


class Database:
    """A database and its tables, which are made when they are missing.

    ``url`` is any SQLAlchemy URL: ``sqlite:///file.db``, ``postgresql://user@host/name``, or
    ``MEMORY``. Every method may be called from any thread. Close it, or use ``with``.

    Tables of an older version of dsv4 are brought up to date, all or none of them. Raises
    ConfigError when the database cannot be used: no driver, no access, or tables of a version that
    this one does not know.
    """

    def __init__(self, url: str | None = None) -> None:
        self._engine = _engine(url or default_url())
        self.name = self._engine.url.render_as_string(hide_password=True)
        # SQLite lets a writer in by chance and others give up; our threads wait in line instead
        sqlite = self._engine.dialect.name == "sqlite"
        self._turn = threading.Lock() if sqlite else contextlib.nullcontext()
        self._readers = sessionmaker(self._engine, expire_on_commit=False)
        writing = self._engine.execution_options(writing=True)
        self._writers = sessionmaker(writing, expire_on_commit=False)
        try:
            self._create()
        except (SQLAlchemyError, OSError) as error:
            self.close()
            reason = str(error.orig if isinstance(error, DBAPIError) else error).strip()
            raise ConfigError(
                f"cannot use the database {self.name}",
                expected="a database that can be written, or a place where one can be made",
                got=reason,
                hint="another one: --database sqlite:///FILE, or the variable DSV4_DATABASE",
            ) from error
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that may write: committed at the end, undone by an exception.

        On SQLite one writer goes at a time, and what it has read stays true until it ends;
        elsewhere lock the rows that must not change (``with_for_update``). Keep it short, and
        begin no second one inside it.
        """
        with self._turn, self._writers.begin() as session:
            yield session

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads, and sees one state; writers do not wait for it."""
        with self._readers() as session:
            yield session

    async def run(self, work: Callable[[Session], T], *, write: bool = False) -> T:
        """``work`` in a transaction and in a worker thread, so that the event loop goes on.

        Once begun it is finished, even if the caller is cancelled meanwhile.
        """

        def transaction() -> T:
            with self.write() if write else self.read() as session:
                return work(session)

        return await asyncio.shield(asyncio.to_thread(transaction))

    def ping(self) -> None:
        """Raises what SQLAlchemy raises when the database does not answer."""
        with self.read() as session:
            session.execute(sqlalchemy.select(SchemaVersion.version))

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _create(self) -> None:
        with self.write() as session:
            if self._engine.dialect.name == "postgresql":  # two servers that start at once
                session.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(5748)"))
            connection = session.connection()
            if sqlalchemy.inspect(connection).has_table(SchemaVersion.__tablename__):
                version = session.scalar(sqlalchemy.select(SchemaVersion.version)) or 0
                if version > SCHEMA or any(v not in UPGRADES for v in range(version, SCHEMA)):
                    raise ConfigError(
                        f"{self.name} was made by another version of dsv4",
                        expected=f"tables of version {SCHEMA}",
                        got=f"version {version}",
                        hint="that version of dsv4, or another database: --database",
                    )
                for old in range(version, SCHEMA):
                    UPGRADES[old](connection)
                session.execute(sqlalchemy.update(SchemaVersion).values(version=SCHEMA))
                Base.metadata.create_all(connection)
            else:
                Base.metadata.create_all(connection)
                session.add(SchemaVersion(version=SCHEMA))


def _engine(url: str) -> Engine:
    try:
        parsed = sqlalchemy.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            return _sqlite(parsed)
        return sqlalchemy.create_engine(parsed, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(
            "this is no URL of a database", expected="sqlite:///FILE or postgresql://...", got=error
        ) from error
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the driver of this database is not installed",
            got=error,
            hint="pip install 'psycopg[binary]' for postgresql://...",
        ) from error


def _sqlite(url: URL) -> Engine:
    options: dict[str, Any] = {"connect_args": {"timeout": PATIENCE, "check_same_thread": False}}
    if url.database in (None, "", ":memory:"):  # one connection, for one user at a time
        options |= {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
    elif "uri" not in url.query:
        _private_file(Path(url.database or ""))
    engine = sqlalchemy.create_engine(url, **options)

    @event.listens_for(engine, "connect")
    def connected(connection: DBAPIConnection, _: object) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")  # readers and a writer at the same time
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: sqlalchemy.Connection) -> None:
        writing = connection.get_execution_options().get("writing")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _private_file(path: Path) -> None:
    """Conversations and key hashes are their owner's alone: a new file and folder are, too."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot use the database {path}",
            expected="a file that can be made and written",
            got=error,
            hint="another one: --database sqlite:///FILE, or the variable DSV4_DATABASE",
        ) from error

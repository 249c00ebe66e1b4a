"""Databases for tests: a SQLite file, and a PostgreSQL server of our own where one is installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from dsv4.server.database import Database


def _program(name: str) -> str | None:
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(versions[-1]) if versions else None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server that ends with the tests; it listens on a socket file only."""
    initdb, server = _program("initdb"), _program("postgres")
    if not initdb or not server:
        pytest.skip("PostgreSQL is not installed")
    user = None
    if os.geteuid() == 0:  # which PostgreSQL refuses to be
        user = "postgres"
    folder = Path(tempfile.mkdtemp(prefix="dsv4-pg-"))
    data = folder / "data"
    if user:
        shutil.chown(folder, user)
    made = subprocess.run(
        [initdb, "-D", data, "-A", "trust", "-U", "dsv4", "--no-sync"],
        user=user, capture_output=True, cwd=folder,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    settings = [f"-cunix_socket_directories={folder}", "-clisten_addresses=", "-cfsync=off"]
    with subprocess.Popen(
        [server, "-D", data, *settings],
        user=user, cwd=folder, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stderr
            while "ready to accept connections" not in (line := process.stderr.readline()):
                assert line, "PostgreSQL did not start"
            yield f"postgresql://dsv4@/postgres?host={folder}"
        finally:
            process.send_signal(signal.SIGINT)  # which does not wait for clients
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/data/test.db"
    url: str = request.getfixturevalue("postgres")
    name = f"test_{abs(hash(tmp_path))}"
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    engine.dispose()
    return f"{url}&options=-csearch_path%3D{name}"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with Database(database_url) as database:
        yield database

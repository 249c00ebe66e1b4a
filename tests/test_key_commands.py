"""``dsv4 keys`` and ``dsv4 usage``: what they print for people and for programs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from dsv4.cli import app
from dsv4.errors import ConfigError
from dsv4.server.accounts import Account, Caller
from dsv4.server.database import LOCAL, Database
from dsv4.server.ledger import Ledger
from dsv4.server.prices import PriceList


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/dsv4.db"


def run(url: str, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments, "--database", url], env={"COLUMNS": "120"})
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def read(url: str, *arguments: str) -> Any:
    return json.loads(run(url, *arguments, "--json"))


def test_a_key_is_made_listed_limited_and_revoked(url: str) -> None:
    secret = run(url, "keys", "create", "guest", "--rpm", "20", "--spend", "2.50").strip()
    (key,) = read(url, "keys", "list")
    assert secret.startswith("sk-") and secret.endswith(key["ending"])
    assert (key["rpm"], key["tpm"], key["spend_usd"], key["spent_usd"]) == (
        20,
        None,
        "2.50",
        "0.00",
    )
    listed = run(url, "keys", "list")
    assert "guest" in listed and secret not in listed and f"sk-...{secret[-4:]}" in listed
    changed = read(url, "keys", "limit", "guest", "--rpm", "none", "--concurrency", "2")
    assert (changed["rpm"], changed["concurrency"], changed["spend_usd"]) == (None, 2, "2.50")
    assert "revoked guest" in run(url, "keys", "revoke", key["id"])
    assert read(url, "keys", "list")[0]["revoked"] and "(revoked)" in run(url, "keys", "list")
    with pytest.raises(ConfigError, match="no key guest"):
        run(url, "keys", "limit", "guest")


@pytest.mark.parametrize(
    "wrong", [("--rpm", "0"), ("--rpm", "many"), ("--spend", "-1"), ("--spend", "1e-13")]
)
def test_a_limit_that_makes_no_sense_is_refused(url: str, wrong: tuple[str, str]) -> None:
    run(url, "keys", "create", "a")
    with pytest.raises(ConfigError, match=r"requests per minute|--rpm|amount of money"):
        run(url, "keys", "limit", "a", *wrong)


def test_usage_shows_tokens_and_exact_costs(url: str) -> None:
    assert "nothing was asked yet" in run(url, "usage")
    assert read(url, "usage") == {"usage": [], "total": None}
    with Database(url) as database:
        ledger = Ledger(database, PriceList())
        for model, tokens in (("deepseek-v4-flash", 1000), ("deepseek-v4-pro", 1)):
            asked = ledger.reserve(Caller(), request=model, model=model, served="v4-nano")
            ledger.settle(asked.charge, hit=tokens, miss=tokens, output=tokens, outcome="stop")
    report = read(url, "usage", "--by", "model", "--check")
    assert report["problems"] == []
    assert [(r["model"], r["cost_usd"]) for r in report["usage"]] == [
        ("deepseek-v4-flash", "0.000448"),
        ("deepseek-v4-pro", "0.000005365"),
    ]
    assert report["total"]["cost_usd"] == "0.000453365" and report["total"]["requests"] == 2
    shown = run(url, "usage", "--check")
    assert "0.000453365" in shown and "1,001" in shown and "the books balance" in shown
    with pytest.raises(ConfigError, match="--by"):
        run(url, "usage", "--by", "colour")
    with Database(url) as database, database.write() as session:
        session.get_one(Account, LOCAL).spent += 1
    assert "its charges sum to" in run(url, "usage", "--check", code=1)


DOCUMENT = Path(__file__).parents[1] / "docs" / "operations.md"
COMMANDS = [
    line.strip() for line in DOCUMENT.read_text().splitlines() if line.startswith("    dsv4 ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_document_is_understood(command: str) -> None:
    _, *arguments = shlex.split(command)
    known: Any = typer.main.get_command(app)
    while hasattr(known, "commands"):
        known = known.commands[arguments.pop(0)]
    with known.make_context(known.name, arguments):  # parses, and refuses what it does not know
        pass

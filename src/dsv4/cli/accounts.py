"""Commands about who may ask and what it cost: keys, usage."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .app import DatabaseUrl, Json, app, open_database

if TYPE_CHECKING:
    from ..server.accounts import Account

keys = typer.Typer(
    help="Keys for the server: make, list, limit and revoke them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(keys, name="keys")

Name = Annotated[str, typer.Argument(help="The name of a key, or its id.")]
Requests = Annotated[
    str | None, typer.Option("--rpm", metavar="N", help="Requests in any 60 seconds; or none.")
]
Tokens = Annotated[
    str | None, typer.Option("--tpm", metavar="N", help="Tokens in any 60 seconds; or none.")
]
Concurrency = Annotated[
    str | None, typer.Option(metavar="N", help="Requests at the same time; or none.")
]
Spend = Annotated[
    str | None,
    typer.Option(metavar="USD", help="All that the key may ever cost, such as 2.50; or none."),
]


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Who or what will use it, such as laptop.")],
    rpm: Requests = None,
    tpm: Tokens = None,
    concurrency: Concurrency = None,
    spend: Spend = None,
    database: DatabaseUrl = None,
) -> None:
    """Make a key and print it: the only time it can be seen. The database keeps a hash.

    \b
    [bold]Examples[/bold]
      dsv4 keys create laptop
      dsv4 keys create guest --rpm 20 --concurrency 2 --spend 2.50
    """
    from ..server.accounts import Keys

    limits = _limits(rpm, tpm, concurrency, spend)
    with open_database(database) as opened:
        print(Keys(opened).create(name, **limits))
        if sys.stdout.isatty():
            print(f"(this key is shown once; its hash is in {opened.name})", file=sys.stderr)


@keys.command("list")
def list_keys(database: DatabaseUrl = None, as_json: Json = False) -> None:
    """Show every key: its name, last characters, limits, and what it has spent."""
    from ..server.accounts import Keys

    with open_database(database) as opened:
        rows = [_described(account) for account in Keys(opened).list()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = ("name", "ending", "made", "rpm", "tpm", "concurrency", "spend_usd", "spent_usd")
    _table(
        ["name", "key", "made", "rpm", "tpm", "at once", "limit USD", "spent USD"],
        [
            [
                f"{row['name']} (revoked)" if row["revoked"] else row["name"],
                f"sk-...{row['ending']}",
                row["made"][:10],
                *("" if row[c] is None else f"{row[c]}" for c in columns[3:]),
            ]
            for row in rows
        ],
        "no keys: dsv4 keys create NAME",
    )


@keys.command()
def revoke(name: Name, database: DatabaseUrl = None) -> None:
    """End a key, at once. What it used stays in the books, and its name is free again."""
    from ..server.accounts import Keys

    with open_database(database) as opened:
        account = Keys(opened).revoke(name)
    print(f"revoked {account.name} (sk-...{account.ending})")


@keys.command()
def limit(
    name: Name,
    rpm: Requests = None,
    tpm: Tokens = None,
    concurrency: Concurrency = None,
    spend: Spend = None,
    database: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Set limits of a key; those not named stay. "none" takes one away.

    A running server obeys from the next request on. Over its rate or concurrency a key gets 429,
    over its spend limit 402; an answer never costs more than the limit leaves.

    \b
    [bold]Examples[/bold]
      dsv4 keys limit guest --spend 10
      dsv4 keys limit guest --rpm none --tpm 100000
    """
    from ..server.accounts import Keys

    limits = _limits(rpm, tpm, concurrency, spend)
    with open_database(database) as opened:
        row = _described(Keys(opened).limit(name, **limits))
    if as_json:
        print(json.dumps(row, indent=2))
        return
    shown = {n: row[n] for n in ("rpm", "tpm", "concurrency", "spend_usd")}
    print(f"{row['name']}: " + ", ".join(f"{n} {v or 'none'}" for n, v in shown.items()))


@app.command()
def usage(
    by: Annotated[
        str, typer.Option(help="What to tell apart: any of day,caller,model; or total.")
    ] = "day,caller,model",
    since: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First day, UTC.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Last day, UTC.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also prove that the books balance.")
    ] = False,
    database: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Show what was asked of the server, and what it cost at the prices of that time, exactly.

    With --check the exit code is 1 when the books do not balance.

    \b
    [bold]Examples[/bold]
      dsv4 usage
      dsv4 usage --by caller --since 2026-05-01
      dsv4 usage --by total --json
    """
    from ..server import ledger
    from ..server.accounts import Keys
    from ..server.prices import dollars

    groups: list[ledger.Grouping] = [g for g in ledger.GROUPINGS if g in by.split(",")]
    if set(by.split(",")) - {*groups, "total"}:
        raise ConfigError("--by", expected="day, caller, model or total", got=by)
    first = since.date() if since else None
    last = until.date() if until else None
    with open_database(database) as opened:
        Keys(opened)
        rows = ledger.usage(opened, groups, since=first, until=last)
        totals = ledger.usage(opened, (), since=first, until=last)
        problems = ledger.check(opened) if check else []
    if as_json:
        report: dict[str, Any] = {"usage": [row.as_json() for row in rows]}
        report["total"] = totals[0].as_json() if totals else None
        if check:
            report["problems"] = problems
        print(json.dumps(report, indent=2))
    else:
        _table(
            [*groups, "requests", "cache hits", "misses", "output", "cost USD"],
            [
                [
                    *(getattr(row, g) for g in groups),
                    *(
                        f"{n:,}"
                        for n in (row.requests, row.hit_tokens, row.miss_tokens, row.output_tokens)
                    ),
                    dollars(row.cost),
                ]
                for row in (rows + totals if groups else rows)
            ],
            "nothing was asked yet",
        )
        if check:
            print("\n".join(problems) or "the books balance")
    if problems:
        raise typer.Exit(1)


def _limits(
    rpm: str | None, tpm: str | None, concurrency: str | None, spend: str | None
) -> dict[str, int | None]:
    """The limits that were named; None for "none"."""
    from ..server.prices import picodollars

    def number(option: str, text: str) -> int:
        if not text.isdecimal():
            raise ConfigError(option, expected="a whole number or none", got=text)
        return int(text)

    given = {"requests_per_minute": ("--rpm", rpm), "tokens_per_minute": ("--tpm", tpm)}
    given["concurrency"] = ("--concurrency", concurrency)
    limits = {
        name: None if text == "none" else number(option, text)
        for name, (option, text) in given.items()
        if text is not None
    }
    if spend is not None:
        limits["spend_limit"] = None if spend == "none" else picodollars(spend)
    return limits


def _described(account: Account) -> dict[str, Any]:
    from ..server.prices import dollars

    limit = account.spend_limit
    return {
        "id": account.id,
        "name": account.name,
        "ending": account.ending,
        "made": account.made.isoformat(timespec="seconds"),
        "revoked": account.revoked and account.revoked.isoformat(timespec="seconds"),
        "rpm": account.requests_per_minute,
        "tpm": account.tokens_per_minute,
        "concurrency": account.concurrency,
        "spend_usd": None if limit is None else dollars(limit),
        "spent_usd": dollars(account.spent),
    }


def _table(columns: list[str], rows: list[list[str]], empty: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print(empty)
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for i, name in enumerate(columns):
        words = name in ("day", "caller", "model", "name", "key", "made")
        table.add_column(name, justify="left" if words else "right", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    # a cost is exact or it is nothing: a narrow terminal breaks lines, not numbers
    Console(width=max(Console().width, 120)).print(table, markup=False)

"""The application, and what its commands share: options, numbers for people, progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..server.database import Database

app = typer.Typer(
    name="dsv4",
    help="The whole DeepSeek-V4 system: its files, its models, training and serving.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
ModelName = Annotated[str, typer.Argument(help="v4-nano, or a checkpoint folder.")]
Numerics = Annotated[str, typer.Option(help="official (as published) or float32.")]
Temperature = Annotated[float, typer.Option(help="0 (always the likeliest token) to 2.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens only: (0, 1].")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Think = Annotated[str, typer.Option(help="Reasoning before the answer: off, high or max.")]
Threads = Annotated[
    int | None,
    typer.Option(help="At most so many. Default: one per core.", min=1, show_default=False),
]
Context = Annotated[
    int | None,
    typer.Option(help="Largest prompt and answer, in tokens. Default: the model's.", min=2),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="DSV4_DATABASE",
        help="An SQLAlchemy URL. Default: a file in the user's data folder.",
        show_default=False,
    ),
]


def size_of(text: str) -> int:
    """Bytes, from such as 500MB, 8G or 1.5e9."""
    units = {"K": 10**3, "M": 10**6, "G": 10**9}
    number, factor = text.upper().strip().removesuffix("B"), 1
    for unit, value in units.items():
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), value
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"expected bytes, such as 8GB or 500MB, got {text}") from None


ExpertMemory = Annotated[
    int | None,
    typer.Option(
        parser=size_of, metavar="SIZE",
        help="Memory for routed experts, such as 8GB; others are read from disk when chosen."
        " Default: all of them if they fit, else what is left.",
        show_default=False,
    ),
]


def open_database(url: str | None) -> Database:
    from ..server import ledger  # noqa: F401  declares its tables
    from ..server.database import Database

    return Database(url)


def use_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def checked_level(think: str) -> str:
    if think not in ("off", "high", "max"):
        raise ConfigError("--think", expected="off, high or max", got=think)
    return think


def packaged(name: str) -> Path | None:
    """The folder of a model that ships in the package, such as v4-nano."""
    folder = Path(__file__).parents[1] / "models" / name
    return folder if (folder / "config.json").is_file() and not Path(name).exists() else None


def human(size: int) -> str:
    for unit, value in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= value:
            return f"{size / value:,.2f} {unit}"
    return f"{size} B"


def count(number: int) -> str:
    for unit, value in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if number >= value:
            return f"{number / value:.2f}{unit}"
    return f"{number:,}"


@contextmanager
def bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, in bytes; silent when stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    quiet = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)

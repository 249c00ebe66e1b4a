"""Commands that plan: what a model costs, where it fits, how a fleet of servers behaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .app import Json, app, human, packaged

if TYPE_CHECKING:
    from ..config import V4Config

plan_app = typer.Typer(
    help="What a V4 model costs, where it fits, what a fleet of servers does.",
    no_args_is_help=True,
)
app.add_typer(plan_app, name="plan")

Plot = Annotated[
    Path | None, typer.Option(help="Draw it: a .png, .svg or .pdf file.", show_default=False)
]


def tokens(text: str) -> int:
    """``131072``, ``128k`` (times 1,024) or ``1m`` (times 1,048,576)."""
    number, unit = text.lower().replace(",", "").replace("_", ""), 1
    if number[-1:] in ("k", "m"):
        number, unit = number[:-1], 1024 if number[-1] == "k" else 1 << 20
    try:
        count = float(number) * unit
    except ValueError:
        count = 0.0
    if not (1 <= count < 2**60 and count == int(count)):
        raise ConfigError(
            "a number of tokens", expected="131072, 128k or 1m", got=text, hint="--context 128k"
        )
    return int(count)


def model_config(name: str) -> V4Config:
    """The config of a preset (flash, pro, ...), of v4-nano, or of a checkpoint folder."""
    from ..config import PRESETS, V4Config

    if name in PRESETS and not Path(name).exists():
        return V4Config.preset(name)
    if not (folder := packaged(name)) and not Path(name).exists():
        raise ConfigError(
            "no such model",
            expected=f"{', '.join(PRESETS)}, v4-nano or a checkpoint folder",
            got=name,
            hint="dsv4 plan efficiency --model flash",
        )
    return V4Config.from_json(folder or name)


def weights_of(text: str) -> dict[str, float]:
    """``bf16=1,index_fp4=1`` as a dictionary."""
    found = {}
    for pair in filter(None, text.split(",")):
        key, _, value = pair.partition("=")
        try:
            found[key.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                "--weights", expected="kind=number pairs such as bf16=1,index_fp4=1", got=pair
            ) from None
    return found


@plan_app.command("efficiency")
def efficiency_command(
    context: Annotated[str, typer.Option(help="Tokens: 131072, 128k, 1m.")] = "1m",
    model: Annotated[
        list[str] | None, typer.Option(help="Another model beside them; may be repeated.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Costs of operations, e.g. bf16=1,index_fp4=1.")
    ] = "",
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """FLOPs per token and KV cache of V4-Flash and V4-Pro, next to V3.2.

    \b
    [bold]Examples[/bold]
      dsv4 plan efficiency
      dsv4 plan efficiency --context 128k --model v4-nano --json
      dsv4 plan efficiency --plot efficiency.png
    """
    from ..planner.efficiency import CONTEXTS, PARTS, efficiency, ratios_over_context

    length, given = tokens(context), weights_of(weights)
    others = {Path(name).name: model_config(name) for name in model or []}
    report = efficiency(length, given, others)
    if plot is not None:
        from ..planner.plots import plot_efficiency

        plot_efficiency(plot, length, given)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"one sequence of {length:,} tokens", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in report["models"]:
        table.add_column(name, justify="right", no_wrap=True)
    rows: list[dict[str, Any]] = list(report["models"].values())

    def add_total(label: str, shown: list[str], ratio: str) -> None:
        table.add_row(label, *shown)
        table.add_row("  of V3.2's", *(f"{r[ratio]:.2%}" for r in rows))
        table.add_row("  V3.2 has", *(f"{1 / r[ratio]:,.4g}x" for r in rows), end_section=True)

    table.add_row("KV bytes a token", *(f"{r['kv_bytes_per_token']:,}" for r in rows))
    add_total("KV cache", [human(r["kv_bytes"]) for r in rows], "kv_ratio")
    for part in PARTS:
        table.add_row(part.replace("_", " "), *(_giga(r["parts"][part]) for r in rows))
    add_total("GFLOPs of a token", [_giga(r["flops"]) for r in rows], "flops_ratio")
    console.print(table)
    kinds = ", ".join(f"{kind} {value:g}" for kind, value in report["weights"].items())
    console.print(f"One operation costs, in FP8 operations: {kinds} (--weights).", highlight=False)
    if given:
        return
    table = Table(title="of V3.2's, at other lengths", box=SIMPLE_HEAD)
    for column in ("tokens", "KV pro", "KV flash", "FLOPs pro", "FLOPs flash"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in ratios_over_context(CONTEXTS):
        shares = [row[m][key] for key in ("kv_ratio", "flops_ratio") for m in ("pro", "flash")]
        table.add_row(f"{row['context'] >> 10}k", *(f"{share:.1%}" for share in shares))
    console.print(table)


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.2f}" if flops > 1e9 else f"{flops / 1e9:.4f}"

"""Commands that make and judge models: train, eval."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from ..train.launch import train_app
from .app import Json, ModelName, Numerics, app, checked_level

app.add_typer(train_app, name="train")


@app.command("eval")
def evaluate(
    model: ModelName,
    seed: Annotated[int, typer.Option(help="Another seed asks other questions.")] = 0,
    n: Annotated[int, typer.Option("--n", help="Questions per task.", min=1)] = 100,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="One task, heldout_loss, bits_per_byte or draft_acceptance; may be given again. "
            "By default all but the longest."
        ),
    ] = None,
    think: Annotated[
        str | None, typer.Option(help="off, high or max, instead of the tasks' own.")
    ] = None,
    numerics: Numerics = "official",
    as_json: Json = False,
) -> None:
    """Measure a model on held-out questions, greedily: accuracy with its 95% interval.

    Three measures are no tasks: the mean loss on held-out documents, the bits needed for a byte
    of held-out English (of the texts that are installed: dsv4 data texts), and how often the MTP
    block drafts what the model says in a dialogue.

    \b
    [bold]Examples[/bold]
      dsv4 eval v4-nano
      dsv4 eval v4-nano --task recall_16k --task addition_4_digits_no_thinking --seed 1 --json
      dsv4 eval v4-nano --task bits_per_byte --task draft_acceptance
    """
    from ..api import load
    from ..evals.run import MEASURES, measures
    from ..evals.run import evaluate as run

    def show(name: str, done: int, correct: int) -> None:
        print(f"\r{name}: {correct} of {done} \033[K", end="", file=sys.stderr, flush=True)

    loaded = load(model, numerics=numerics)
    asked, others = ([x for x in task or () if (x in MEASURES) is yes] for yes in (False, True))
    report = run(
        loaded,
        seed,
        n,
        asked if task else None,
        show if sys.stderr.isatty() else None,
        thinking=checked_level(think) if think else None,
    )
    if (others or not task) and loaded.tokenizer is not None:
        report |= measures(loaded, loaded.tokenizer, seed, n, others)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if as_json:
        print(json.dumps({"model": model, "numerics": numerics} | report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: {n} held-out questions a task, seed {seed}", box=SIMPLE_HEAD)
    table.add_column("task", no_wrap=True)
    table.add_column("thinking")
    for column in ("right", "95% interval", "chance"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in report["tasks"].items():
        low, high = row["interval"]
        shares = f"{row['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", f"{row['chance']:.0%}"
        table.add_row(name, row["thinking"], *shares)
    if report["tasks"]:
        Console().print(table)
    if "heldout_loss" in report:
        losses = (f"{name} {loss:.3f}" for name, loss in report["heldout_loss"].items())
        print("held-out loss, nats a token: " + ", ".join(losses))
    for name, row in report.get("bits_per_byte", {}).items():
        print(f"{name}: {row['bits']:.3f} bits a byte; chance {row['chance']:.3f}")
    if row := report.get("draft_acceptance"):
        low, high = row["interval"]
        print(
            f"MTP drafts accepted in dialogue: {row['acceptance']:.1%} of {row['drafts']}"
            f" ({low:.1%} to {high:.1%}); chance {row['chance']:.1%}"
        )

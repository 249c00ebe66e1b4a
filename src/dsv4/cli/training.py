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
        list[str] | None, typer.Option(help="One task; may be given again. All by default.")
    ] = None,
    think: Annotated[
        str | None, typer.Option(help="off, high or max, instead of the tasks' own.")
    ] = None,
    numerics: Numerics = "official",
    as_json: Json = False,
) -> None:
    """Measure a model on held-out questions, greedily: accuracy with its 95% interval.

    Without --task the mean loss on held-out documents is measured too.

    \b
    [bold]Examples[/bold]
      dsv4 eval v4-nano
      dsv4 eval v4-nano --task recall_500 --n 200 --seed 1 --json
    """
    from ..api import load
    from ..evals.run import evaluate as run
    from ..evals.run import heldout_loss

    def show(name: str, done: int, correct: int) -> None:
        print(f"\r{name}: {correct} of {done} \033[K", end="", file=sys.stderr, flush=True)

    loaded = load(model, numerics=numerics)
    report = run(
        loaded,
        seed,
        n,
        task or None,
        show if sys.stderr.isatty() else None,
        thinking=checked_level(think) if think else None,
    )
    if task is None and loaded.tokenizer is not None:
        report["heldout_loss"] = heldout_loss(loaded, loaded.tokenizer, seed, n)
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
    Console().print(table)
    if "heldout_loss" in report:
        losses = (f"{name} {loss:.3f}" for name, loss in report["heldout_loss"].items())
        print("held-out loss, nats a token: " + ", ".join(losses))

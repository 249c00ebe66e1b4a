"""``dsv4 train``: run a recipe, plot a run. ``python -m dsv4.train`` is the same program."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class WithDefault(TyperGroup):
    """A group whose first command need not be named: ``dsv4 train x`` is ``dsv4 train run x``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the first command's name in front of arguments that name none."""
        named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        if not named and (args or not self.no_args_is_help):
            args = [self.list_commands(ctx)[0], *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest


train_app = typer.Typer(
    cls=WithDefault,
    no_args_is_help=True,
    help="Train a model by a recipe ([bold]dsv4 train RECIPE[/bold]), or plot how it went.",
)


@train_app.command("run")
def train_run(
    recipe: Annotated[Path, typer.Argument(help="A TOML file such as recipes/v4-nano.toml.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default runs/NAME-OF-THE-RECIPE.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option(help="Write RUN/tensorboard too; needs dsv4[watch].")
    ] = False,
    expert_parallel: Annotated[
        int, typer.Option(help="Divide the routed experts over so many processes of torchrun.")
    ] = 1,
) -> None:
    """Train a model by a recipe; the same command again goes on where it stopped.

    Ctrl-C ends the step, saves and stops. The folder holds log.jsonl, checkpoints/ and, at the
    end, parent/ (the float model) and model/ (official FP4 + FP8 format), which every other
    command takes. Whatever kills it, nothing but the steps since the last checkpoint is lost.

    \b
      dsv4 train recipes/v4-nano.toml
      dsv4 train plot runs/v4-nano
      dsv4 chat runs/v4-nano/model
      torchrun --nproc-per-node 2 -m dsv4.train recipes/v4-nano.toml
    """
    from ..engine.memory import forget_peak, peak_bytes
    from .distributed import Ranks
    from .loop import Run
    from .recipes import Recipe, changes

    forget_peak()
    before = peak_bytes()
    folder = out or Path("runs") / recipe.stem
    what = Recipe.read(recipe)
    with Ranks(expert_parallel) as ranks, Run(what, folder, ranks, tensorboard) as run:
        if ranks.first:
            counts = run.config.parameter_counts()
            print(
                f"{folder}: {counts.total / 1e6:.1f}M parameters, "
                f"{counts.active / 1e6:.1f}M active; step {run.step} of {run.recipe.steps}",
                file=sys.stderr,
            )
            if ranks.size == 1:
                planned = run.planned_bytes() / 1e9
                print(f"  memory, at most, by the plan: {planned:.2f} GB", file=sys.stderr)
            for line in changes(run.recipe):
                print(f"  not the report's: {line}", file=sys.stderr)
            if hint := _faster(run.recipe.dtype):
                print(f"  {hint}", file=sys.stderr)
        run.train()
        if ranks.first:
            print(f"peak memory: {(peak_bytes() - before) / 1e9:.2f} GB", file=sys.stderr)


def _faster(dtype: str) -> str:
    """Advice where this machine multiplies float32 faster than bfloat16; "" where it does not."""
    import torch

    if dtype != "bfloat16":
        return ""
    seconds = {}
    for kind in (torch.bfloat16, torch.float32):
        a, times = torch.ones(512, 512, dtype=kind), []
        for _ in range(5):
            begin = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - begin)
        seconds[kind] = min(times)
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    if ratio < 1.25:
        return ""
    return f'float32 is multiplied {ratio:.1f} times as fast here: try dtype = "float32"'


@train_app.command("plot")
def train_plot(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; default RUN/plots.")
    ] = None,
) -> None:
    """Draw a run's log: PNG files of loss, routing, gradients and updates, mixing, drafts.

    \b
      dsv4 train plot runs/v4-nano
    """
    from .plots import plot

    for file in plot(run, out or run / "plots"):
        print(file)


@train_app.command("ablations")
def train_ablations(
    folder: Annotated[
        Path, typer.Argument(help="base.toml and questions, such as recipes/ablations.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/ablations"),
    docs: Annotated[
        Path | None, typer.Option(help="Folder for page, pictures, receipts; default OUT.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.", min=1)] = 3,
    question: Annotated[
        list[str] | None, typer.Option(help="One question; may be given again. All by default.")
    ] = None,
) -> None:
    """Train the variants of each question on equal tokens; write a page with tables and plots.

    What is done is not repeated: give the command again after an interruption, or to write
    the page anew. One seed of everything comes before the next seed.

    \b
      dsv4 train ablations recipes/ablations --docs docs
      dsv4 train ablations recipes/ablations --question optimizer --seeds 1
    """
    from ..errors import TrainingError
    from .ablations import questions, run
    from .findings import report

    found = questions(folder)
    names = [q.name for q in found]
    if unknown := sorted({*(question or [])} - {*names}):
        raise TrainingError("no such question", expected=", ".join(names), got=", ".join(unknown))
    asked = [q for q in found if not question or q.name in question]
    receipts = run(asked, out, range(seeds), lambda line: print(line, file=sys.stderr, flush=True))
    print(report(asked, receipts, docs or out))

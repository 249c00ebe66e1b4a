"""A run's log as pictures: one PNG for each question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from .runfiles import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#888888"
STYLE: Any = {
    "figure.dpi": 130,
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.4,
}

Lines = list[dict[str, Any]]


def plot(run: Path, out: Path) -> list[Path]:
    """Write the pictures of the run in folder ``run`` into ``out``; their paths.

    ``loss`` (with the learning rate), ``load`` (of every expert), ``rms`` (of gradients and
    updates), ``mixing`` (singular values of the mHC matrices) and ``drafts`` (how often the MTP
    block is right). TrainingError without a log, a logged step or matplotlib.
    """
    lines, spikes = course(read_log(run))
    if not lines:
        raise TrainingError(
            f"nothing to draw in {run}", expected="a logged step", got="none", hint="train longer"
        )
    pictures: dict[str, tuple[str, Callable[[Figure, Lines], list[Axes]]]] = {
        "loss": ("loss", _loss),
        "load": ("load", _load),
        "rms": ("grad_rms", _rms),
        "mixing": ("mixing", _mixing),
        "drafts": ("mtp_acceptance", _drafts),
    }
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (key, draw) in pictures.items():
        shown = [line for line in lines if line.get(key)]
        if not shown:
            continue
        with picture(out / f"{name}.png") as figure:
            for axes in draw(figure, shown):
                for step in spikes:
                    axes.axvline(step, color=ORANGE, linewidth=0.8, linestyle=":")
                axes.set_xlim(lines[0]["step"], max(lines[-1]["step"], lines[0]["step"] + 1))
            files.append(out / f"{name}.png")
    return files


def course(log: Lines) -> tuple[Lines, list[int]]:
    """The logged steps that the model is made of, and the steps at which it went back.

    What was logged between the step it went back to and the spike is left out.
    """
    lines: Lines = []
    spikes = []
    for line in log:
        if "loss" in line and "event" not in line:
            lines.append(line)
        elif "back_to" in line:
            spikes.append(line["step"])
            lines = [kept for kept in lines if kept["step"] <= line["back_to"]]
    return lines, spikes


@contextmanager
def picture(file: Path) -> Iterator[Figure]:
    """A figure in this package's style, written to ``file``; TrainingError without matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise TrainingError(
            "matplotlib is not installed", got=e, hint="pip install 'dsv4[plot]'"
        ) from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(STYLE):
        figure = plt.figure(figsize=(8, 4.5), layout="constrained")
        try:
            yield figure
            figure.savefig(file)
        finally:
            plt.close(figure)


def _column(lines: Lines, *keys: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, where it is there."""
    steps, values = [], []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            steps.append(line["step"])
            values.append(value)
    return steps, values


def _smooth(values: list[float]) -> list[float]:
    """Means over the last twentieth of what came so far, which a trend is read from."""
    out = []
    for i in range(len(values)):
        part = values[max(0, i - max(1, len(values) // 20)) : i + 1]
        out.append(sum(part) / len(part))
    return out


def _log_scale(axes: Axes) -> None:
    """A logarithmic axis that names plain numbers, more of them where it spans little."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high < 100 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")


def _loss(figure: Figure, lines: Lines) -> list[Axes]:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for key, label, color in (("loss", "next token", BLUE), ("mtp", "MTP: the one after", ORANGE)):
        steps, values = _column(lines, key)
        if values:
            top.plot(steps, values, color=color, alpha=0.25, linewidth=0.9)
            smooth = _smooth(values)
            top.plot(steps, smooth, color=color, label=f"{label}: {smooth[-1]:.3f} at the end")
    top.set_title("Training loss")
    top.set_ylabel("nats per token")
    _log_scale(top)
    top.legend()
    bottom.plot(*_column(lines, "lr"), color=GREEN)
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("step")
    return [top, bottom]


def _load(figure: Figure, lines: Lines) -> list[Axes]:
    """One strip per router: experts from top to bottom, steps to the right."""
    import numpy as np

    names = list(lines[0]["load"])
    figure.set_size_inches(8, 1.1 + 0.75 * len(names))
    strips = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    image = None
    edges = [line["step"] for line in lines]
    edges = [edges[0] - (edges[1] - edges[0] if len(edges) > 1 else 1), *edges]
    for axes, name in zip(strips, names, strict=True):
        load = np.array([line["load"][name] for line in lines]).T
        experts = np.arange(load.shape[0] + 1) - 0.5
        image = axes.pcolormesh(edges, experts, load, cmap="RdBu_r", vmin=0, vmax=2)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set_yticks([])
        axes.grid(False)
        axes.invert_yaxis()
    figure.suptitle(
        "Load of every expert, by router (1: its even share)", x=0.01, ha="left", weight="bold"
    )
    strips[-1].set_xlabel("step")
    assert image is not None
    figure.colorbar(image, ax=list(strips), extend="max", fraction=0.04, pad=0.01)
    return list(strips)


def _rms(figure: Figure, lines: Lines) -> list[Axes]:
    import matplotlib.pyplot as plt

    figure.set_size_inches(9, 6)
    panels = figure.subplots(2, 1, sharex=True)
    groups = sorted({g for line in lines for g in line["grad_rms"]})
    colors = dict(zip(groups, map(plt.get_cmap("tab20"), range(20)), strict=False))
    titles = ("RMS of gradients, before clipping", "RMS of updates, in learning rates")
    for axes, key, title in zip(panels, ("grad_rms", "update_rms"), titles, strict=True):
        curves = {g: _column(lines, key, g) for g in groups}
        curves = {g: c for g, c in curves.items() if c[1] and max(c[1]) > 0}
        for group, (steps, values) in sorted(curves.items(), key=lambda x: -_smooth(x[1][1])[-1]):
            axes.plot(steps, _smooth(values), color=colors[group], label=group)
        _log_scale(axes)
        axes.set_title(title)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    panels[-1].set_xlabel("step")
    return list(panels)


def _mixing(figure: Figure, lines: Lines) -> list[Axes]:
    """Largest singular value is 1 by construction; the second says how much streams keep apart."""
    import numpy as np

    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    steps = [line["step"] for line in lines]
    values = np.array([line["mixing"] for line in lines])  # [lines, sites, streams]
    edges = [2 * steps[0] - (steps[1] if len(steps) > 1 else steps[0] + 1), *steps]
    sites = np.arange(values.shape[1] + 1) - 0.5
    image = left.pcolormesh(edges, sites, values[:, :, 1].T, cmap="viridis")
    left.grid(False)
    left.invert_yaxis()
    left.set_title("Second singular value of mHC mixing")
    left.set_xlabel("step")
    left.set_ylabel("site (attention, experts, attention, ...)")
    figure.colorbar(image, ax=left, pad=0.01)
    for i, color in enumerate((GREY, BLUE, ORANGE, GREEN)[: values.shape[2]]):
        right.plot(values[-1, :, i], color=color, marker="o", markersize=3, label=f"value {i + 1}")
    right.set_title(f"All of them, at step {steps[-1]:,}")
    right.set_xlabel("site")
    right.set_ylabel("mean singular value")
    right.legend(loc="lower left")
    return [left]


def _drafts(figure: Figure, lines: Lines) -> list[Axes]:
    axes = figure.subplots()
    steps, values = _column(lines, "mtp_acceptance")
    percent = [100 * v for v in values]
    axes.plot(steps, percent, color=BLUE, alpha=0.25, linewidth=0.9)
    smooth = _smooth(percent)
    axes.plot(steps, smooth, color=BLUE, label=f"{smooth[-1]:.0f}% at the end")
    axes.set_title("MTP drafts that the model would have said itself (greedy)")
    axes.set_ylabel("% of trained tokens")
    axes.set_ylim(0, 100)
    axes.set_xlabel("step")
    axes.legend(loc="lower right")
    return [axes]

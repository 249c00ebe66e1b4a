"""The planner's figures. matplotlib is optional: ``pip install 'dsv4[plot]'``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .efficiency import efficiency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"v3.2": "#9aa0a6", "pro": "#1f4e9c", "flash": "#e07b00"}
NAMES = {"v3.2": "DeepSeek-V3.2", "pro": "DeepSeek-V4-Pro", "flash": "DeepSeek-V4-Flash"}


def figure_of(width: float, height: float) -> Figure:
    """An empty figure, in inches; ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError(
            "plots need matplotlib", got="not installed", hint="pip install 'dsv4[plot]'"
        ) from e
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure; the ending decides the format (png, svg, pdf)."""
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"cannot write the plot {path}", expected="a .png, .svg or .pdf file", got=e
        ) from e


def plot_efficiency(path: str | Path, context: int, weights: dict[str, float]) -> None:
    """FLOPs per token and KV cache over position, up to ``context``: the report's figure 1."""
    figure = figure_of(10, 4)
    left, right = figure.subplots(1, 2)
    points = sorted({max(1, context * i // 32) for i in range(1, 33)})
    reports = [efficiency(n, weights)["models"] for n in points]
    for axes, key, unit, label, claim in (
        (left, "flops", 1e12, "FLOPs of one token (T, FP8-equivalent)", "lower"),
        (right, "kv_bytes", 1e9, "KV cache of one sequence (GB)", "smaller"),
    ):
        for name in NAMES:
            values = [report[name][key] / unit for report in reports]
            axes.plot([n / 1024 for n in points], values, color=COLOURS[name], label=NAMES[name])
            if name != "v3.2":
                times = reports[-1]["v3.2"][key] / reports[-1][name][key]
                above = name == "pro"
                axes.annotate(
                    f"{times:.1f}x {claim}", (context / 1024, values[-1]),
                    (-6, 5 if above else -6), textcoords="offset points", ha="right",
                    va="bottom" if above else "top", color=COLOURS[name], fontsize=9,
                )  # fmt: skip
        axes.set_xlabel("position in the sequence (K tokens)")
        axes.set_ylabel(label)
        axes.set_xlim(0, context / 1024)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    save(figure, path)


def plot_fleet(path: str | Path, reports: Sequence[dict[str, Any]]) -> None:
    """Waiting times and throughput (with cost, where known) over the number of nodes."""
    figure = figure_of(10, 4)
    left, right = figure.subplots(1, 2)
    nodes = [report["replicas"] for report in reports]
    for key, name, colour in (
        ("ttft", "time to first token", COLOURS["pro"]),
        ("inter_token", "between tokens", COLOURS["flash"]),
    ):
        for share, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
            values = [1000 * (report[key][share] or 0) for report in reports]
            left.plot(nodes, values, style, color=colour, marker=".", label=f"{name}, {share}")
    left.set_ylabel("milliseconds")
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    speeds = [report["output_tokens_per_second"] for report in reports]
    right.plot(nodes, speeds, color=COLOURS["pro"], marker=".")
    right.set_ylabel("output tokens per second")
    if all("cost_per_million_output" in report for report in reports):
        cost = right.twinx()
        values = [report["cost_per_million_output"] for report in reports]
        cost.plot(nodes, values, color=COLOURS["flash"], marker=".")
        cost.set_ylabel("US$ per million output tokens", color=COLOURS["flash"])
        cost.set_ylim(bottom=0)
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("nodes")
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    low, high = left.get_ylim()
    left.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend
    save(figure, path)

"""``dsv4 bench report``: the tables and the roofline of docs/performance.md, out of receipts.

A folder holds what the bench commands print with ``--json``: ``kernels*.json``, ``layers*.json``,
``cache*.json``, ``context*.json``, ``soak*.json`` and ``peers.json`` (the receipt of ``bench
peers``). The part of the page between its two marks is
written anew; nothing in it is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import bench_context
from .bench import Report
from .errors import ConfigError

BEGIN, END = "<!-- receipts -->", "<!-- end of receipts -->"


def update(page: Path, folder: Path) -> list[Path]:
    """Write the tables of the receipts in ``folder`` into ``page``; returns what was written.

    With matplotlib and a receipt of kernels also ``roofline.png`` beside the page. Raises
    ConfigError when there is no receipt, or the page has not the two marks.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ConfigError(f"{page} has no place for tables", expected=f"{BEGIN} ... {END}", got="")
    files = sorted(folder.glob("*.json"))
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    parts = [_tables(name, report) for name, report in found.items()]
    if not any(parts):
        raise ConfigError("no receipts", expected="kernels.json, layers.json or peers.json",
                          got=str(folder))  # fmt: skip
    written = [page]
    context = next((r for name, r in found.items() if name.startswith("context")), None)
    if context is not None:
        bench_context.plot(page.parent / "context.png", context)
        written.append(page.parent / "context.png")
        parts.append("![a growing context](context.png)\n")
    kernels = next((r for name, r in found.items() if name.startswith("kernels")), None)
    if kernels is not None and _plot(kernels, page.parent / "roofline.png"):
        written.append(page.parent / "roofline.png")
        parts.append("![roofline](roofline.png)\n")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    body = "\n".join(part for part in parts if part)
    page.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{after}", encoding="utf-8")
    return written


def _tables(name: str, report: Report) -> str:
    if name.startswith("kernels"):
        return _kernels(report)
    if name.startswith("layers"):
        return _layers(report)
    if name.startswith("cache"):
        return _cache(report)
    if name.startswith("context"):
        return _context(report)
    if name.startswith("soak"):
        return _soak(report)
    return "\n".join(_part(*item) for item in report["parts"].items()) if "parts" in report else ""


def _kernels(report: Report) -> str:
    rows = [
        [
            case["name"], case["rows"], _spread(case["ms"], case["ms_low"], case["ms_high"], ".3f"),
            f"{case['gb_per_s']:.1f}", f"{case['tflop_per_s']:.3f}", case["limit"],
            f"{case['of_limit']:.0%}",
        ]
        for case in report["cases"]
    ]  # fmt: skip
    heads = ("kernel", "rows", "ms", "GB/s", "TFLOP/s", "limit", "of the limit")
    return (
        f"### Kernels at {report['shapes']} shapes\n\n{_machine(report)}\n\n{_table(heads, rows)}"
    )


def _layers(report: Report) -> str:
    phases = report["prefill"], report["decode"]
    rows = [
        [f"layer {i}, {both[0]['kind']}", *(_spread(e["ms"], e["low"], e["high"]) for e in both)]
        for i, both in enumerate(zip(*(phase["layers"] for phase in phases), strict=True))
    ]
    rows.append(["embedding and head", *(f"{phase['rest_ms']:.3f}" for phase in phases)])
    for kernel in report["decode"]["kernels"]:
        shares = [phase["kernels"].get(kernel, 0.0) for phase in phases]
        if max(shares) >= 0.01:
            rows.append([f"share of {kernel}", *(f"{share:.0%}" for share in shares)])
    rows.append(
        ["mHC, norms and routing of the layers", *(f"{p['small_kernels']:.1%}" for p in phases)]
    )
    count = phases[0]["whole"]["layers"]
    speeds = (f"{phase['whole']['tokens_per_s']:.2f}" for phase in phases)
    rows.append([f"tokens a second with {count} layers", *speeds])
    heads = ("ms a token", f"prefill of {report['settings']['prompt']}", "decode")
    return (
        f"### Layers of V4-{report['of'].capitalize()}\n\n{_machine(report)} Layers of one kind are"
        f" taken to cost the same, and all weights to be in memory.\n\n{_table(heads, rows)}"
    )


def _cache(report: Report) -> str:
    peers = list(dict.fromkeys(p for case in report["cases"] for p in case.get("peers", ())))
    rows = []
    for case in report["cases"]:
        sooner = "" if case["sooner"] is None else f"{case['sooner']:.1f}"
        row = [case["name"], f"{case['prompt']:,}", f"{case['computed']:,}",
               f"{case['seconds']:.3f}", sooner]  # fmt: skip
        for peer in peers:
            found = case.get("peers", {}).get(peer)
            row.append(f"{found['seconds']:.3f} ({found['computed']:,})" if found else "")
        rows.append(row)
    heads = ("", "prompt", "computed", "first token, s", "times sooner than cold",
             *(f"{peer}, s (computed)" for peer in peers))  # fmt: skip
    title = f"### {report['model']}: a prompt of {report['settings']['prompt']:,} tokens again"
    return f"{title}\n\n{_machine(report)}\n\n{_table(heads, rows)}"


def _context(report: Report) -> str:
    rows = [
        [f"{row['length']:,}", f"{row['prefill_tokens_per_s']:,.0f}",
         f"{row['prefill_seconds']:,.0f}", f"{row['decode_ms']:.2f}", f"{row['decode_ratio']:.2f}",
         f"{row['bytes'] / 1e6:,.1f}", f"{row['planned_bytes'] / 1e6:,.1f}"]
        for row in report["lengths"]
    ]  # fmt: skip
    heads = ("tokens", "prefill, tok/s", "s in all", "a decoded token, ms", "times the first",
             "state, MB", "by plan, MB")  # fmt: skip
    disk, rewind = report["disk"], report["rewind"]
    return (
        f"### {report['model']}: one growing context\n\n{_machine(report)}\n\n"
        f"{_table(heads, rows)}\n"
        f"{disk['bytes'] / 1e6:,.0f} MB to disk in {disk['write_seconds']:.2f} s and back in"
        f" {disk['read_seconds']:.2f} s; one plain file of that size:"
        f" {disk['plain_write_seconds']:.2f} and {disk['plain_read_seconds']:.2f} s. Rewinding"
        f" {rewind['tokens']:,} tokens: {rewind['seconds']:.3f} s.\n"
    )


def _soak(report: Report) -> str:
    settings, total = report["settings"], report["total"] or {}
    rows = [
        ["answers, of which hung up on", f"{sum(report['answers'].values()):,},"
                                         f" {report['answers'].get('hung up', 0):,}"],
        ["tokens", f"{report['tokens']:,}"],
        ["asked again, other answers", f"{report['asked_again']:,}, {len(report['drift'])}"],
        ["failures, left running, problems in the books",
         f"{len(report['failures'])}, {report['running']}, {len(report['problems'])}"],
        ["requests in the books", f"{total.get('requests', 0):,}"],
        ["memory after the warm-up and at the end, MB",
         f"{report['warm_bytes'] / 1e6:.1f}, {report['end_bytes'] / 1e6:.1f}"
         f" ({report['growth']:+.1%})"],
    ]  # fmt: skip
    return (
        f"### {report['model']}: {settings['minutes']:.0f} minutes of {settings['users']} users\n\n"
        f"{_table(('', ''), rows)}"
    )


def _part(name: str, part: Report) -> str:
    names = list(
        dict.fromkeys(
            engine
            for row in part["rows"].values()
            for engine in (*row["engines"], *row.get("recorded", {}))
        )
    )
    rows = []
    for key, row in part["rows"].items():
        cells = [key]
        for engine in names:
            figure = row["engines"].get(engine, {})
            if "median" in figure:
                form = ".1e" if key == "kl" else ",.1f"
                cells.append(_spread(figure["median"], figure["low"], figure["high"], form))
            elif engine in row.get("recorded", {}):
                cells.append(f"{row['recorded'][engine]:,.0f} (recorded)")
            else:
                cells.append("failed" if "error" in figure else "")
        rows.append(cells)
    if not rows:
        return ""
    unit = "milliseconds a call" if name == "experts" else "tokens a second"
    first = next(iter(part["rows"].values()))
    return f"### {name}: {unit}\n\n{_machine(first)}\n\n{_table(['', *names], rows)}"


def _spread(median: float, low: float, high: float, form: str = ".3f") -> str:
    text = format(median, form)
    return text if low == high else f"{text} ({low:{form}} to {high:{form}})"


def _machine(report: Report) -> str:
    m, when = report["machine"], report.get("time", "")
    return (
        f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}: reads"
        f" {m['stream_read_gb_per_s']:.1f} GB/s, multiplies {m['bf16_tflop_per_s']:.2f} (BF16) and"
        f" {m['f32_tflop_per_s']:.2f} (float32) TFLOP/s."
        f" Commit {report.get('commit') or 'unknown'}{', ' + when[:10] if when else ''}."
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def _plot(report: Report, path: Path) -> bool:
    """Each case at its operations a byte beside the roof; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    stream = report["machine"]["stream_read_gb_per_s"]
    peak = 1e3 * report["machine"]["bf16_tflop_per_s"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    points = [
        (1e3 * case["tflop_per_s"] / case["gb_per_s"], 1e3 * case["tflop_per_s"], case["name"])
        for case in report["cases"]
    ]
    ends = [min(p[0] for p in points) / 2, max(p[0] for p in points) * 2]
    roof = [ends[0], peak / stream, ends[1]] if ends[0] < peak / stream < ends[1] else ends
    axes.loglog(roof, [min(peak, stream * x) for x in roof], color="black")
    for i, name in enumerate(dict.fromkeys(point[2] for point in points)):
        mine = [point for point in points if point[2] == name]
        axes.scatter([p[0] for p in mine], [p[1] for p in mine], label=name, color=f"C{i}")
    axes.set_xlabel("operations for each byte that must be read")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    return True

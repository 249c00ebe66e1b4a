"""The ablations as a page: a table and a picture for each question, from the receipts alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from .ablations import RECALL, SCARCE, Question, Receipt, Variant
from .plots import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = dict[str, list[Receipt]]  # of each variant, the receipts of its seeds, in order
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def report(questions: Sequence[Question], receipts: Sequence[Receipt], docs: Path) -> Path:
    """Write ``ablations.md``, its pictures and ``ablations.json``, the receipts; the page's path.

    A variant without a receipt is said to be missing. TrainingError without matplotlib.
    """
    docs.mkdir(parents=True, exist_ok=True)
    seeds = sorted({r["seed"] for r in receipts})
    by_key = {r["key"]: r for r in receipts}
    parts = [_HEAD.format(seeds=len(seeds))]
    for question in questions:
        found = {
            variant.name: [
                by_key[key] for seed in seeds if (key := variant.seeded(seed).key) in by_key
            ]
            for variant in question.variants
        }
        parts += [f"## {question.title}\n\n{question.about}\n", _sizes(question.variants, found)]
        there = {name: some for name, some in found.items() if some}
        if there:
            file = docs / f"ablations-{question.name}.png"
            _draw(question, there, file)
            parts += [_table(question, there), f"![{question.title}]({file.name})\n"]
        if missing := [name for name, some in found.items() if len(some) < len(seeds)]:
            parts.append(f"Not (or not with every seed) trained yet: {', '.join(missing)}.\n")
    lines = ",\n".join(json.dumps(receipt) for receipt in receipts)
    (docs / "ablations.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    page = docs / "ablations.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


_HEAD = """# What each part is worth

This page is written by the command below from the receipts in `ablations.json`; only the questions
are written by hand (`recipes/ablations/`). Small models and short runs: what helps here need not
help at V4's size, and what makes no difference here may make one there.

```
dsv4 train ablations recipes/ablations --docs docs
```

Every variant is trained with {seeds} seeds, on as many tokens and, seed by seed, on the same data.
Losses are nats a token on the same held-out documents; the mean over the seeds comes first, the
lowest and the highest behind it. *Against the first* is the mean of the differences seed by seed,
and in how many of them the variant's loss was lower.
"""


def _sizes(variants: Sequence[Variant], found: Found) -> str:
    some = [receipts[0] for receipts in found.values() if receipts]
    if not some:
        return ""
    tokens, layers = some[0]["tokens"], variants[0].recipe.config().num_hidden_layers
    sizes = sorted({f"{r['parameters'] / 1e6:.1f}M" for r in some})
    minutes = [mean(r["seconds"] for r in receipts) / 60 for receipts in found.values() if receipts]
    return (
        f"{layers} layers, {' or '.join(sizes)} parameters, {tokens:,} tokens; "
        f"{min(minutes):.1f} to {max(minutes):.1f} minutes a run.\n"
    )


# ------------------------------------------------------------------ tables


def _spread(receipts: Sequence[Receipt], value: Callable[[Receipt], float], form: str) -> str:
    values = [value(r) for r in receipts]
    if min(values) == max(values):
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _against(first: Sequence[Receipt], other: Sequence[Receipt]) -> str:
    losses = {r["seed"]: r["loss"] for r in first}
    both = [r["loss"] - losses[r["seed"]] for r in other if r["seed"] in losses]
    if not both or first is other:
        return ""
    return f"{mean(both):+.4f}, lower in {sum(d < 0 for d in both)} of {len(both)}"


def _columns(question: Question) -> dict[str, Callable[[Sequence[Receipt]], str]]:
    def column(value: Callable[[Receipt], float], form: str) -> Callable[[Sequence[Receipt]], str]:
        return lambda receipts: _spread(receipts, value, form)

    columns = {"held-out loss": column(lambda r: r["loss"], ".4f")}
    if "stored" in question.shows:
        columns["stored in FP4 and FP8"] = column(lambda r: r["stored_loss"], ".4f")
        columns["lost by it"] = column(lambda r: r["stored_loss"] / r["loss"] - 1, ".2%")
    if "growth" in question.shows:
        columns["RMS of the streams, last block to first"] = column(
            lambda r: r["streams"][-1] / r["streams"][1], ".2f"
        )
        columns["largest gain of the mixing"] = column(lambda r: max(r["gain"]), ".3g")
    if "load" in question.shows:
        columns["busiest expert, in even shares"] = column(lambda r: r["busiest"], ".2f")
        columns[f"experts below {SCARCE:.0%} of theirs"] = column(lambda r: r["scarce"], ".1%")
    if "recall" in question.shows:
        for length in RECALL:
            columns[f"recall at {length:,}"] = column(
                lambda r, n=str(length): r["recall"][n], ".0%"  # type: ignore[misc]
            )
    return columns


def _table(question: Question, found: Found) -> str:
    columns = _columns(question)
    first = next(iter(found.values()))
    head = ["", *columns, "against the first"]
    rows = [
        [name, *(cell(receipts) for cell in columns.values()), _against(first, receipts)]
        for name, receipts in found.items()
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# ------------------------------------------------------------------ pictures


def _draw(question: Question, found: Found, file: Path) -> None:
    panels = {name: draw for name, draw in _PANELS.items() if name in question.shows}
    with picture(file) as figure:
        figure.set_size_inches(4.6 * len(panels), 3.8)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for one, draw in zip(axes, panels.values(), strict=True):
            draw(one, found)
        axes[0].legend(fontsize=8)


def _lines(
    axes: Axes, found: Found, xs: Callable[[Receipt], Sequence[float]],
    ys: Callable[[Receipt], Sequence[float]],
) -> None:  # fmt: skip
    """A line for each variant, the mean of its seeds, in the band from lowest to highest."""
    for (name, receipts), color in zip(found.items(), COLORS * 3, strict=False):
        columns = list(zip(*(ys(r) for r in receipts), strict=True))
        x = list(xs(receipts[0]))
        axes.plot(x, [mean(c) for c in columns], color=color, label=name)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def _loss(axes: Axes, found: Found) -> None:
    skipped = {n: [{**r, "curve": r["curve"][1:] or r["curve"]} for r in s]
               for n, s in found.items()}  # fmt: skip  # the first losses hide the others
    _lines(axes, skipped, *(lambda r, i=i: [row[i] for row in r["curve"]] for i in (0, 1)))
    axes.set_title("Training loss")
    axes.set_xlabel("tokens")
    axes.set_ylabel("nats a token")


def _stored(axes: Axes, found: Found) -> None:
    names = list(found)
    lost = [[100 * (r["stored_loss"] / r["loss"] - 1) for r in found[n]] for n in names]
    colors = [color for _, color in zip(names, COLORS * 3, strict=False)]
    axes.bar(range(len(names)), [mean(values) for values in lost], color=colors)
    for i, values in enumerate(lost):
        axes.plot([i] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_title("Lost by storing in FP4 and FP8")
    axes.set_ylabel("% of the loss")


def _recall(axes: Axes, found: Found) -> None:
    _lines(axes, found, lambda r: RECALL, lambda r: [100 * r["recall"][str(n)] for n in RECALL])
    axes.set_xscale("log", base=2)
    axes.set_xticks(RECALL, [f"{n:,}" for n in RECALL])
    axes.set_ylim(-2, 102)
    axes.set_title("Recall by length")
    axes.set_xlabel("tokens of the text")
    axes.set_ylabel("% right")


def _growth(axes: Axes, found: Found) -> None:
    _lines(axes, found, lambda r: range(len(r["streams"])), lambda r: r["streams"])
    axes.set_yscale("log")
    axes.set_title("Residual streams through depth")
    axes.set_xlabel("block (0: the embedding)")
    axes.set_ylabel("RMS")


def _load(axes: Axes, found: Found) -> None:
    _lines(axes, found, *(lambda r, i=i: [row[i] for row in r["curve"]] for i in (0, 2)))
    axes.set_title("Busiest expert, training")
    axes.set_xlabel("tokens")
    axes.set_ylabel("even shares")


_PANELS: Mapping[str, Callable[[Axes, Found], None]] = {
    "loss": _loss,
    "stored": _stored,
    "recall": _recall,
    "growth": _growth,
    "load": _load,
}

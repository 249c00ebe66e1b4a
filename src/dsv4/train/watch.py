"""Watching a run: what a log line holds, the progress display, TensorBoard."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from .. import kernels
from ..errors import TrainingError
from ..model import Transformer
from ..numerics import Numerics
from .data import Batch

PROBE_TOKENS = 512


def group_of(name: str) -> str:
    """The part of the model a parameter belongs to, as plots name it."""
    return next((group for part, group in _GROUPS.items() if part in name), "head")


_GROUPS = {
    "hc_": "mHC",
    ".indexer.": "indexer",
    ".compressor.": "compressor",
    "norm.weight": "norms",
    ".gate.": "router",
    ".experts.": "experts",
    "shared_experts.": "shared experts",
    "_proj.": "MTP projections",
    ".attn.": "attention",
    "embed": "embedding",
    "tok_emb": "embedding",
}


class GroupRMS:
    """Root mean squares of tensors, by part of the model."""

    def __init__(self) -> None:
        self._squares: dict[str, float] = defaultdict(float)
        self._elements: dict[str, int] = defaultdict(int)

    def add(self, name: str, value: Tensor) -> None:
        group = group_of(name)
        self._squares[group] += float(value.square().sum())
        self._elements[group] += value.numel()

    def values(self, summed: Callable[[list[float]], list[float]] = list) -> dict[str, float]:
        """By part; ``summed`` adds up what several processes have seen."""
        groups = sorted({*_GROUPS.values(), "head"})
        sums = summed([*(self._squares[g] for g in groups), *(self._elements[g] for g in groups)])
        pairs = zip(groups, sums[: len(groups)], sums[len(groups) :], strict=True)
        return {g: (square / count) ** 0.5 for g, square, count in pairs if count}


class Averages:
    """Means over the steps since the last log line; part of a checkpoint."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self._sums: dict[str, list[float]] = dict(state.get("sums", {}))  # name: sum, count
        self._loads: list[list[int]] = list(state.get("loads", []))  # tokens of each expert

    def state(self) -> dict[str, Any]:
        """What makes the same object again, for JSON."""
        return {"sums": self._sums, "loads": self._loads}

    def add(self, values: Mapping[str, float], loads: Iterable[Tensor]) -> None:
        """``loads``: of each router, how many tokens went to each expert."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = [total + value, count + 1]
        new = [load.tolist() for load in loads]
        old = self._loads or [[0] * len(load) for load in new]
        pairs = zip(old, new, strict=True)
        self._loads = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]

    def take(self) -> tuple[dict[str, float], list[list[float]]]:
        """The means, and the loads relative to an even one; starts anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        loads = [[n * len(load) / max(1, sum(load)) for n in load] for load in self._loads]
        self._sums, self._loads = {}, []
        return means, loads


def rounded(value: Any) -> Any:
    """Every float in a log line with seven significant digits."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


@torch.no_grad()
def probe(net: Transformer, batch: Batch, nx: Numerics) -> dict[str, Any]:
    """What a forward pass over the first samples of a batch (about 512 tokens) shows.

    ``mtp_acceptance``: the share of the trained tokens for which the MTP block's first choice is
    the trunk's, so that a draft would be accepted. ``mixing``: for each mHC site, in order, the
    mean singular values of its mixing matrices, largest first.
    """
    ends = list(accumulate(batch.lengths))
    samples = max(1, sum(end <= PROBE_TOKENS for end in ends))
    ids, weights = (x[:, : ends[samples - 1]] for x in batch[:2])
    run = net.start(ids, nx, lengths=batch.lengths[:samples])
    with recorded_mixing() as matrices:
        streams = net.trunk(run)
    spectra = torch.stack([torch.linalg.svdvals(m.flatten(0, -3)).mean(0) for m in matrices])
    out: dict[str, Any] = {"mixing": spectra.tolist()}
    if net.mtp and run.packing is not None:
        places = run.packing.followed()
        drafts = net.mtp_logits(net.mtp_streams(streams, run), run)[0].argmax(-1)
        counts = (weights[0].roll(-2) > 0)[places] & (places + 2 < ids.shape[1])
        sure = net.logits(streams[:, places[counts] + 1], run)[0].argmax(-1)
        if counts.any():
            out["mtp_acceptance"] = float((drafts[counts] == sure).float().mean())
    return out


@contextmanager
def recorded_mixing() -> Iterator[list[Tensor]]:
    """Every mHC mixing matrix that is computed meanwhile, ``[..., h, h]`` each."""
    matrices: list[Tensor] = []
    sinkhorn = kernels.sinkhorn

    def recorded(*args: Any) -> Tensor:
        matrices.append(sinkhorn(*args))
        return matrices[-1]

    kernels.sinkhorn = recorded  # type: ignore[assignment]
    try:
        yield matrices
    finally:
        kernels.sinkhorn = sinkhorn


class Show:
    """The progress bar on a terminal and, when asked for, TensorBoard's files."""

    def __init__(self, folder: Path, steps: int, done: int, tensorboard: bool) -> None:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("training", total=steps, completed=done)
        self._board = _board(folder / "tensorboard", done) if tensorboard else None

    def __enter__(self) -> Show:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._board is not None:
            self._board.close()

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def line(self, line: Mapping[str, Any]) -> None:
        """A new log line."""
        self._bar.update(
            self._task,
            description=f"loss {line['loss']:.3f}  {line['tokens_per_s']:,.0f} tokens/s  "
            f"busiest expert x{line['worst_load']:.1f}",
        )
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, line["step"])
                elif isinstance(value, dict) and name.endswith("_rms"):
                    for group, rms in value.items():
                        self._board.add_scalar(f"{name}/{group}", rms, line["step"])


def _board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise TrainingError(
            "TensorBoard is not installed", got=e, hint="pip install 'dsv4[watch]'"
        ) from e
    return SummaryWriter(folder, purge_step=done + 1)

"""What a run is: the recipe, its stages and their schedules, and the report's own values.

A recipe is a TOML file: a preset, what differs from it, and ``[[stages]]`` in order. The presets
``flash`` and ``pro`` start from the values of the report (sections 4.2.2 and 4.2.3), so a file that
names only the preset is the report's recipe; ``changes`` lists where another one departs from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..config import PRESETS, V4Config
from ..errors import TrainingError
from .data import KINDS, POOL
from .losses import ATTENTION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Stage:
    """A part of a run: its data, its sizes, its learning rate and what is trained.

    Sizes grow over the first ``ramp`` steps from ``first_...`` (0: no growth) to their value.
    """

    steps: int = 3000
    shares: dict[str, float] = field(default_factory=dict)  # documents per task; empty: the usual
    tokens_per_batch: int = 4096
    first_tokens_per_batch: int = 0
    length: int = 2048  # tokens of the longest sample
    first_length: int = 0
    ramp: int = 0
    warmup: int = 0  # steps of linear rise to lr
    lr: float = 1.0  # times the recipe's lr, after the warm-up
    final_lr: float = 1.0  # likewise at the end; a cosine goes from one to the other
    mtp_weight: float = 0.3
    attention: str = "dense"  # no indexer; "warmup": only it is trained; "sparse": it chooses
    qat_steps: int = 0  # at the end of the stage, with weights passed through FP4 / FP8

    def lr_factor(self, step: int) -> float:
        """Share of the recipe's learning rate at a step of this stage, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (self.lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def tokens_at(self, step: int) -> int:
        """Tokens of the batch of a step: a linear ramp, in multiples of 64."""
        first = self.first_tokens_per_batch or self.tokens_per_batch
        grown = first + (self.tokens_per_batch - first) * self._ramped(step)
        return self.tokens_per_batch if self._ramped(step) == 1 else round(grown / 64) * 64

    def length_at(self, step: int) -> int:
        """Longest sample of a step, in tokens: it grows by a constant factor per step."""
        first = self.first_length or self.length
        return round(first * math.exp(self._ramped(step) * math.log(self.length / first)))

    def _ramped(self, step: int) -> float:
        return min(1.0, step / self.ramp) if self.ramp else 1.0


@dataclass(frozen=True)
class Recipe:
    """What a run is. Every field can be set in the TOML file; unknown keys are refused.

    In the file a key of ``Stage`` may also stand above the stages (``lr`` excepted, which is the
    recipe's own there): it then holds for every stage that does not say otherwise.
    """

    preset: str = "nano"
    model: dict[str, Any] = field(default_factory=dict)  # config keys that differ from the preset
    weights: str = ""  # a checkpoint's folder, or a shipped model's name: where training starts
    seed: int = 0
    vocab_documents: int = 20000  # from which the tokenizer is made
    init_std: float = 0.0  # of the first weights; 0: by fan-in, which suits small models
    dtype: str = "bfloat16"  # of activations and matmuls; "float32" to compare runs
    tokens_per_pass: int = 0  # a batch is taken in passes of so many tokens, a rank; 0: at once
    recompute: bool = False  # activations again for the gradient: less memory, more time
    frozen: list[str] = field(default_factory=list)  # parameters with this in their name stay
    # optimizer
    optimizer: str = "muon"  # of the matrices; or "adamw", which takes the rest anyway
    lr: float = 5e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    update_rms: float = 0.18
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-20
    grad_clip: float = 1.0
    # losses and routing
    balance_weight: float = 1e-4
    bias_update: float = 1e-3
    index_weight: float = 1.0
    # spikes (see spikes.py)
    spike_window: int = 64  # steps whose median loss is what is usual; 0: only a loss of NaN counts
    spike_factor: float = 10.0  # median absolute deviations above it that make a spike
    rollback: int = 20  # go back at least so many steps
    anticipate_delay: int = 4  # routes are made so many steps ahead
    anticipate_steps: int = 100  # and used for so many steps after a spike
    # files
    checkpoint_every: int = 50
    keep: int = 3  # the last checkpoints
    keep_every: int = 0  # and for ever those of steps that are a multiple of this
    log_every: int = 10
    stages: tuple[Stage, ...] = (Stage(warmup=60),)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """From a TOML file; TrainingError for unknown keys, wrong types and missing files."""
        return cls.of(read_toml(path), str(path))

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """From what a TOML file holds; TrainingError for unknown keys and wrong types."""
        data = dict(table)
        own = {f.name for f in fields(cls)} - {"stages"}
        stages = data.pop("stages", None)
        for_all = {k: data.pop(k) for k in list(data) if k not in own and k in _STAGE_KEYS}
        base = REPORT.get(str(data.get("preset")), cls())
        if stages is None:
            kept = base.stages if not for_all else (_stage({}, for_all, where),)
        elif type(stages) is not list or not stages or not all(type(s) is dict for s in stages):
            raise TrainingError(f"{where}: stages", expected="[[stages]] tables", got=stages)
        else:
            kept = tuple(_stage(s, for_all, f"{where}: stages") for s in stages)
        recipe = replace(base, **_checked(base, data, where), stages=kept)
        recipe.check(where)
        return recipe

    def check(self, where: str = "recipe") -> None:
        """TrainingError for values that no run can have."""

        def refuse(what: str, expected: object, got: object) -> None:
            raise TrainingError(f"{where}: {what}", expected=expected, got=got)

        if self.preset not in PRESETS:
            refuse("preset", ", ".join(PRESETS), self.preset)
        for name, known in (("dtype", ("bfloat16", "float32")), ("optimizer", ("muon", "adamw"))):
            if getattr(self, name) not in known:
                refuse(name, ", ".join(known), getattr(self, name))
        for name in ("log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                refuse(name, "at least 1", getattr(self, name))
        for stage in self.stages:
            wrong = sorted(set(stage.shares) - set(KINDS))
            if wrong:
                refuse("shares", ", ".join(KINDS), ", ".join(wrong))
            if stage.attention not in ATTENTION:
                refuse("attention", ", ".join(ATTENTION), stage.attention)
            if stage.steps < 1:
                refuse("steps of a stage", "at least 1", stage.steps)
        for first in range(0, self.steps, POOL):  # as the data reads them
            longest = self.length_at(first)
            smallest = min(self.tokens_at(first), self.tokens_at(first + POOL - 1))
            if not 64 <= longest <= smallest:
                refuse(f"length at step {first}", f"64 to tokens_per_batch, {smallest}", longest)

    def config(self) -> V4Config:
        """The model's configuration."""
        return replace(V4Config.preset(self.preset), **self.model)

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, int]:
        """The stage of a step of the run, and the step's number in it; both count from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        return stage, step + stage.steps

    def lr_at(self, step: int) -> float:
        """The learning rate of a step of the run."""
        stage, n = self.at(step)
        return self.lr * stage.lr_factor(n)

    def tokens_at(self, step: int) -> int:
        """Tokens of the batch of a step of the run."""
        stage, n = self.at(step)
        return stage.tokens_at(n)

    def length_at(self, step: int) -> int:
        """The longest sample of a step of the run, in tokens."""
        stage, n = self.at(step)
        return stage.length_at(n)

    def past(self, step: int) -> dict[str, Any]:
        """All that decided the run's first ``step`` steps, for JSON.

        Two recipes with the same past differ only in stages that begin later and in how files
        are kept; a run may go on from one to the other.
        """
        begun, total = [], 0
        for stage in self.stages:
            if total <= max(0, step - 1):
                begun.append(asdict(stage))
            total += stage.steps
        kept = {"checkpoint_every", "keep", "keep_every", "log_every", "stages"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in kept}
        return values | {"stages": begun}


_STAGE_KEYS = {f.name for f in fields(Stage)}


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file holds; TrainingError when there is none or it is not TOML."""
    try:
        table: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise TrainingError(
            "no such recipe", expected="a TOML file", got=path, hint="see recipes/"
        ) from e
    except tomllib.TOMLDecodeError as e:
        raise TrainingError(f"{path} is not TOML", got=e) from e
    return table


def fingerprint(values: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a mapping's JSON, keys in order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _stage(own: dict[str, Any], for_all: dict[str, Any], where: str) -> Stage:
    return Stage(**_checked(Stage(), for_all | own, where))


def _checked(defaults: Any, given: dict[str, Any], where: str) -> dict[str, Any]:
    """``given`` if it has fields of a dataclass and values of their types; whole floats pass."""
    known = [f.name for f in fields(defaults) if f.name != "stages"]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TrainingError(
            f"{where} has keys that it cannot have",
            expected=", ".join(known),
            got=", ".join(unknown),
        )
    out = {}
    for key, value in given.items():
        wanted = type(getattr(defaults, key))
        value = float(value) if wanted is float and type(value) is int else value
        if type(value) is not wanted:
            raise TrainingError(f"{where}: {key}", expected=wanted.__name__, got=repr(value))
        out[key] = value
    return out


# ------------------------------------------------------------------ the report's values

# Published: learning rates, warm-up, largest batch, the order of lengths and of attention, MTP
# weights, balance, decay, optimizer. Not published, and chosen here: how the tokens are divided
# among the stages, where the batch ramp starts and how long it is (the whole adds up to the
# report's 32T and 33T tokens, dense attention to Flash's 1T). The indexer's warm-up is V3.2's
# (2.1B tokens in 1,000 steps at 1e-3); initial weights and clipping are V3's.


def _report(
    preset: str, lr: float, batch: int, dense_4k: int, dense_16k: int, sparse: int, decay: int
) -> Recipe:
    stages = (
        Stage(
            dense_4k, tokens_per_batch=batch, first_tokens_per_batch=batch // 12, ramp=8000,
            length=4096, warmup=2000,
        ),
        Stage(dense_16k, tokens_per_batch=batch, length=16384),
        Stage(
            1000, tokens_per_batch=2_097_152, length=65536, attention="warmup",
            lr=1e-3 / lr, final_lr=1e-3 / lr,
        ),
        Stage(sparse, tokens_per_batch=batch, length=65536, attention="sparse"),
        Stage(
            decay, tokens_per_batch=batch, length=1_048_576, attention="sparse",
            final_lr=0.1, mtp_weight=0.1,
        ),
    )  # fmt: skip
    return Recipe(
        preset, lr=lr, init_std=0.006, checkpoint_every=500, keep_every=10_000, stages=stages
    )


REPORT = {
    "flash": _report("flash", 2.7e-4, 18_432 * 4096, 10_000, 6_900, 300_000, 110_600),
    "pro": _report("pro", 2.0e-4, 23_040 * 4096, 12_000, 40_000, 200_000, 101_300),
}


def changes(recipe: Recipe) -> list[str]:
    """Where a recipe departs from the report's, as lines ``what: report's -> this one's``.

    It is compared with the preset's own size, ``nano`` with Flash.
    """
    size = recipe.preset.partition("-")[0]
    report = _values(REPORT.get(size, REPORT["flash"]))
    mine = _values(recipe)
    return [f"{k}: {report[k]} -> {mine[k]}" for k in report if report[k] != mine[k]]


def _values(recipe: Recipe) -> dict[str, str]:
    """The values of a recipe for which the report gives one, as text."""
    stages = recipe.stages
    tokens = sum(s.tokens_per_batch * s.steps for s in stages)

    def each(values: list[str]) -> str:
        return ", ".join(v for i, v in enumerate(values) if i == 0 or v != values[i - 1])

    names = (
        "weight_decay", "momentum", "update_rms", "beta1", "beta2", "eps", "grad_clip",
        "balance_weight", "bias_update", "init_std",
    )  # fmt: skip
    return {
        "tokens, at most": f"{tokens:.3g}",
        "learning rate": f"{recipe.lr:g}",
        "learning rate at the end": f"{recipe.lr * stages[-1].final_lr:g}",
        "warm-up steps": f"{stages[0].warmup:,}",
        "tokens per batch": f"{max(s.tokens_per_batch for s in stages):,}",
        "longest sample": each([f"{s.length:,}" for s in stages]),
        "attention": each([s.attention for s in stages]),
        "MTP weight": each([f"{s.mtp_weight:g}" for s in stages]),
        "optimizer of the matrices": recipe.optimizer,
        "not trained": ", ".join(recipe.frozen) or "nothing",
    } | {name: f"{getattr(recipe, name):g}" for name in names}

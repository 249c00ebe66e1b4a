"""Pre-training, plain: read a recipe, take batches by number, step, log, checkpoint, export.

A run is a folder: ``recipe.toml`` (a copy), ``log.jsonl`` (a line per logged step), ``state.pt``
(everything needed to go on bit for bit), ``parent/`` (the float model) and ``model/`` (the same in
the official instruct format). Stopping it at any moment loses at most the steps since the last
checkpoint; running the same command again goes on.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import quant
from ..checkpoint import inventory, save_checkpoint
from ..config import PRESETS, V4Config
from ..errors import TrainingError
from ..model import TRAIN, TRAIN_QAT, Gate, Transformer
from ..tokenizer import Tokenizer
from .data import KINDS, Batch, batches, corpus_for_tokenizer, ramp
from .optim import MuonAdamW, OptimSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Stage:
    """A part of a run: which data, and how the learning rate goes."""

    steps: int = 3000
    shares: dict[str, float] = field(default_factory=dict)  # documents per task; empty: the usual
    warmup: int = 60  # steps of linear rise to lr
    lr: float = 1.0  # times the recipe's lr, after the warm-up
    final_lr: float = 1.0  # likewise at the end; a cosine goes from one to the other
    mtp_weight: float = 0.3
    qat_steps: int = 0  # at the end of the stage, with weights passed through FP4 / FP8

    def lr_factor(self, step: int) -> float:
        """Share of the recipe's learning rate at a step of this stage, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (self.lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Recipe:
    """What a run is. Every field can be set in the TOML file; unknown keys are refused."""

    preset: str = "nano"
    model: dict[str, Any] = field(default_factory=dict)  # config keys that differ from the preset
    seed: int = 0
    tokens_per_batch: int = 4096
    first_length: int = 192  # tokens of the longest recall document at first
    last_length: int = 2048  # and at the end of the length ramp
    ramp_steps: int = 1200
    lr: float = 5e-3
    weight_decay: float = 0.1
    balance_weight: float = 1e-4
    bias_update: float = 1e-3
    grad_clip: float = 1.0
    vocab_documents: int = 20000
    checkpoint_minutes: float = 3.0
    log_every: int = 10
    stages: tuple[Stage, ...] = (Stage(),)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """From a TOML file; TrainingError for unknown keys, wrong types and missing files."""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise TrainingError(
                "no such recipe", expected="a TOML file", got=path, hint="see recipes/"
            ) from e
        except tomllib.TOMLDecodeError as e:
            raise TrainingError(f"{path} is not TOML", got=e) from e
        stages = data.pop("stages", [{}])
        if type(stages) is not list or not all(type(s) is dict for s in stages) or not stages:
            raise TrainingError(f"{path}: stages", expected="[[stages]] tables", got=stages)
        kept = tuple(Stage(**_checked(Stage(), s, f"{path}: stages")) for s in stages)
        recipe = cls(**_checked(cls(), data, str(path)), stages=kept)
        if recipe.preset not in PRESETS:
            raise TrainingError("preset", expected=", ".join(PRESETS), got=recipe.preset)
        for stage in kept:
            wrong = sorted(set(stage.shares) - set(KINDS))
            if wrong:
                raise TrainingError(
                    f"{path}: shares", expected=", ".join(KINDS), got=", ".join(wrong)
                )
        return recipe

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


class Run:
    """One training run in a folder."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self.config = recipe.config()
        self.tokenizer = self._tokenizer()
        self.net = Transformer(self.config)
        self.net.init_weights(recipe.seed)
        settings = OptimSettings(lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.optim = MuonAdamW(self.net.named_parameters(), settings)
        self.gates = [m for m in self.net.modules() if isinstance(m, Gate) and m.bias is not None]
        self.resumed = self._resume()

    def _tokenizer(self) -> Tokenizer:
        file = self.folder / "tokenizer"
        if not (file / "tokenizer.json").exists():
            r = self.recipe
            corpus = corpus_for_tokenizer(r.seed, r.vocab_documents)
            Tokenizer.train(corpus, self.config.vocab_size, progress=False).save(file)
        return Tokenizer.load(file)

    # ------------------------------------------------------------ one step

    def loss(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, float], Any]:
        """The training loss of one batch, its parts, and what each router did."""
        r, net = self.recipe, self.net
        stage, step = r.at(self.step)
        nx = TRAIN_QAT if step >= stage.steps - stage.qat_steps else TRAIN
        run = net.start(ids, nx)
        run.balance = []
        streams = net.trunk(run)
        main = self._token_loss(streams[:, :-1], ids[:, 1:], weights[:, 1:], run, net.logits)
        total, parts = main, {"loss": main.item()}
        if net.mtp and stage.mtp_weight:
            ahead = net.mtp_streams(streams, run)[:, :-1]
            mtp = self._token_loss(ahead, ids[:, 2:], weights[:, 2:], run, net.mtp_logits)
            total = total + stage.mtp_weight * mtp
            parts["mtp"] = mtp.item()
        for scores, chosen in run.balance:
            share = torch.bincount(chosen.flatten(), minlength=scores.shape[1]) / chosen.numel()
            wanted = (scores / scores.sum(-1, keepdim=True)).mean(0)
            total = total + r.balance_weight * scores.shape[1] * (share * wanted).sum()
        return total, parts, run.balance

    @staticmethod
    def _token_loss(
        streams: Tensor, targets: Tensor, weights: Tensor, run: Any, head: Any
    ) -> Tensor:
        """Mean cross-entropy over the tokens that count; only their logits are computed."""
        at = weights.flatten().nonzero().squeeze(1)
        logits = head(streams.flatten(0, 1)[at], run)
        losses = F.cross_entropy(logits, targets.flatten()[at], reduction="none")
        w = weights.flatten()[at]
        return (losses * w).sum() / w.sum().clamp_min(1.0)

    def train_step(self, ids: Tensor, weights: Tensor) -> dict[str, float]:
        """One update; returns what is worth logging. TrainingError when the loss is not finite."""
        r = self.recipe
        total, parts, routed = self.loss(ids, weights)
        if not math.isfinite(parts["loss"]):
            raise TrainingError(
                f"the loss is {parts['loss']} at step {self.step}",
                hint="lower lr; the last good state is in state.pt",
            )
        total.backward()
        trained = [p for p in self.net.parameters() if p.requires_grad]
        for p in trained:  # experts that saw no token
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = torch.nn.utils.clip_grad_norm_(trained, r.grad_clip)
        stage, step = r.at(self.step)
        self.optim.step(stage.lr_factor(step))
        for p in trained:
            p.grad = None
        worst = 1.0
        with torch.no_grad():
            for gate, (_, chosen) in zip(self.gates, routed, strict=True):
                assert gate.bias is not None
                load = torch.bincount(chosen.flatten(), minlength=len(gate.bias)).float()
                gate.bias += r.bias_update * torch.sign(load.mean() - load)
                worst = max(worst, float(load.max() / load.mean()))
        return parts | {"grad_norm": float(norm), "worst_load": worst}

    # ------------------------------------------------------------ the run

    def data(self) -> Iterator[Batch]:
        """Batches from the present step on."""
        r, end = self.recipe, 0
        length = ramp(r.first_length, r.last_length, r.ramp_steps)
        for stage in r.stages:
            begin, end = max(end, self.step), end + stage.steps
            if begin < end:
                yield from islice(
                    batches(
                        self.tokenizer,
                        r.seed,
                        r.tokens_per_batch,
                        length,
                        begin,
                        weights=stage.shares or None,
                    ),
                    end - begin,
                )

    def train(self) -> None:
        """Go on until ``steps``; Ctrl-C or SIGTERM saves and stops. Exports at the end."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        r = self.recipe
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        saved = time.monotonic()
        window: list[dict[str, float]] = []
        stream = self.data()
        with Progress(*columns, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("training", total=r.steps, completed=self.step)
            log = (self.folder / "log.jsonl").open("a", encoding="utf-8")
            try:
                while self.step < r.steps:
                    began = time.perf_counter()
                    ids, weights, _ = next(stream)
                    window.append(self.train_step(ids, weights))
                    self.step += 1
                    self.tokens += ids.numel()
                    took = time.perf_counter() - began
                    self.seconds += took
                    window[-1]["tokens_per_s"] = ids.numel() / took
                    if self.step % r.log_every == 0:
                        stage, step = r.at(self.step - 1)
                        mean = {
                            k: sum(w[k] for w in window if k in w) / len(window) for k in window[-1]
                        }
                        window.clear()
                        line = {
                            "step": self.step,
                            "tokens": self.tokens,
                            "seconds": round(self.seconds, 1),
                            "lr": r.lr * stage.lr_factor(step),
                        } | {k: round(v, 5) for k, v in mean.items()}
                        log.write(json.dumps(line) + "\n")
                        log.flush()
                        text = f"loss {mean['loss']:.3f}  {mean['tokens_per_s']:.0f} tok/s"
                        bar.update(task, description=text)
                    bar.update(task, completed=self.step)
                    if time.monotonic() - saved > 60 * r.checkpoint_minutes:
                        self.save()
                        saved = time.monotonic()
            except KeyboardInterrupt:
                print("stopped; the same command goes on from here", file=sys.stderr)
                return
            finally:
                log.close()
                self.save()
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        self.export()

    # ------------------------------------------------------------ files

    def save(self) -> None:
        """Write ``state.pt`` whole or not at all."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "config": self.config.to_dict(),
            "model": self.net.state_dict(),
            "optim": self.optim.state_dict(),
        }
        fresh = self.folder / "state.pt.new"
        with fresh.open("wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        fresh.replace(self.folder / "state.pt")

    def _resume(self) -> bool:
        file = self.folder / "state.pt"
        if not file.exists():
            return False
        try:
            state = torch.load(file, weights_only=True)
        except Exception as e:
            raise TrainingError(
                f"{file} cannot be read", got=e, hint="delete it to start over"
            ) from e
        if state["config"] != self.config.to_dict():
            raise TrainingError(
                f"{file} is a run of another model",
                expected="the recipe's configuration",
                hint="give another --out folder",
            )
        self.net.load_state_dict(state["model"])
        self.optim.load_state_dict(state["optim"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        return True

    def export(self) -> None:
        """Write ``parent/`` (BF16) and ``model/`` (official instruct format)."""
        export(self.net, self.folder / "parent", _float_config(self.config), self.tokenizer)
        export(self.net, self.folder / "model", self.config, self.tokenizer)


def _float_config(config: V4Config) -> V4Config:
    return replace(config, expert_dtype="bf16", quantization_config=None)


_STORE = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}


def export(net: Transformer, folder: Path, config: V4Config, tokenizer: Tokenizer) -> None:
    """Write float masters as an official checkpoint of ``config``'s format, tokenizer included."""
    masters = net.state_dict()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        scales: dict[str, Tensor] = {}
        for name, spec in sorted(inventory(config).items(), key=lambda x: x[0].endswith(".scale")):
            if name in scales:
                yield name, scales.pop(name)
                continue
            value = masters[name]
            if spec.dtype in _STORE:
                yield name, value.to(_STORE[spec.dtype])
                continue
            make = quant.quantize_fp4 if spec.dtype == "I8" else quant.quantize_fp8
            codes, scale = make(value)
            scales[name.removesuffix("weight") + "scale"] = scale
            yield name, codes

    save_checkpoint(folder, config, dict(tensors()))
    tokenizer.save(folder)

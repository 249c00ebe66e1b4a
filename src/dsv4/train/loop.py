"""Pre-training: take batches by number, step, log, checkpoint, and at the end export.

A run is a folder: ``log.jsonl``, ``checkpoints/``, ``tokenizer/`` and, at the end, ``parent/`` (the
float model) and ``model/`` (the same in the official instruct format). Whenever it is stopped or
killed, the same command goes on from the last checkpoint, and weights and log become bit for bit
those of a run that was never stopped; only the clock in the log differs.
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import quant
from ..api import find_model
from ..checkpoint import Checkpoint, inventory, save_checkpoint
from ..config import V4Config
from ..engine import memory
from ..errors import TrainingError
from ..model import Transformer
from ..planner import training_peak_bytes
from ..tokenizer import Tokenizer
from .data import Batch, batches, corpus_for_tokenizer
from .distributed import Ranks
from .initial import init_weights
from .losses import Objective, Shares, learned_gates, losses, routes
from .optim import MuonAdamW, OptimSettings
from .recipes import Recipe, changes, fingerprint
from .runfiles import Checkpoints, RunLog, lock
from .spikes import SpikeWatch
from .watch import Averages, GroupRMS, Show, probe, rounded

RELEASE_EVERY = 32_768  # tokens; samples of many lengths scatter freed memory over ever more pages
KEPT = 2_000_000_000  # bytes of freed memory that the next step finds: it need not be mapped again
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Run:
    """One training run in a folder, which no other process can train into while it is open."""

    def __init__(
        self, recipe: Recipe, folder: Path, ranks: Ranks | None = None, tensorboard: bool = False
    ) -> None:
        self.recipe, self.folder, self.ranks = recipe, folder, ranks or Ranks()
        self.tensorboard = tensorboard
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(folder) if self.ranks.first else None
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        r = self.recipe
        memory.reuse(KEPT)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.config = r.config()
        self.checkpoints = Checkpoints(
            self.folder, r.checkpoint_every, r.keep, r.keep_every, self.ranks
        )
        self.tokenizer = self._tokenizer()
        self.net = Transformer(self.config)
        init_weights(self.net, r.seed, r.init_std or None)
        if r.weights and not self.checkpoints.steps():
            start_from(self.net, r.weights)
        for name, p in self.net.named_parameters():
            if any(part in name for part in r.frozen):
                p.requires_grad_(False)
        settings = OptimSettings(
            r.optimizer == "muon", r.weight_decay, r.momentum, r.update_rms,
            (r.beta1, r.beta2), r.eps, dtype=DTYPES[r.dtype],
        )  # fmt: skip
        self.held = self.ranks.divide(self.net)  # what this process updates and saves
        self.optim = MuonAdamW(self.held.items(), settings)
        self.gates = learned_gates(self.net)
        self.spikes = SpikeWatch(r.spike_window, r.spike_factor)
        self.anticipate_until = 0  # routing is done ahead for the steps before this one
        self.routes: deque[list[list[Tensor]]] = deque()  # of this step and the next ones
        self.averages = Averages()
        self._ahead: deque[Batch] = deque()  # batches of this step and the next ones
        self._position = 0  # in the log
        self._saved = -1  # the step of the last checkpoint
        self._stream = self.data()
        self.resumed = self._resume()

    def close(self) -> None:
        """Let other processes train into the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _tokenizer(self) -> Tokenizer:
        folder, fresh = self.folder / "tokenizer", self.folder / ".tokenizer.new"
        if self.ranks.first and not folder.exists():
            r = self.recipe
            shutil.rmtree(fresh, ignore_errors=True)
            if r.weights:
                tokenizer = Tokenizer.load(find_model(r.weights))
            else:
                corpus = corpus_for_tokenizer(r.seed, r.vocab_documents)
                tokenizer = Tokenizer.train(corpus, self.config.vocab_size, progress=False)
            tokenizer.save(fresh)
            fresh.rename(folder)
        self.ranks.wait()
        return Tokenizer.load(folder)

    # ------------------------------------------------------------ one step

    def objective(self) -> Objective:
        """What the present step minimises."""
        r = self.recipe
        stage, number = r.at(self.step)
        return Objective(
            mtp_weight=stage.mtp_weight,
            balance_weight=r.balance_weight,
            attention=stage.attention,
            index_weight=r.index_weight,
            qat=number >= stage.steps - stage.qat_steps,
            recompute=r.recompute,
            dtype=DTYPES[r.dtype],
        )

    def train_step(self, log: RunLog) -> dict[str, Any] | None:
        """One update, or a return to an earlier step after a spike (None then).

        Returns what the step has to show; more of it when its log line is due. TrainingError when
        the loss is not finite and going back has not helped.
        """
        r = self.recipe
        if r.at(self.step)[1] == 0:
            self.spikes.losses.clear()
        began = time.perf_counter()
        batch, objective = self._coming(0), self.objective()
        parts, loads = self._gradients(batch, objective)
        gradients = {  # zero for experts without a token
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in self.net.named_parameters()
            if p.requires_grad and objective.trains(name)
        }
        norm = self.ranks.norm(gradients)
        if self._is_spike(parts["loss"] if math.isfinite(norm) else norm, log):
            self.net.zero_grad()
            return None
        line_due = (self.step + 1) % r.log_every == 0
        sizes, updates = GroupRMS(), GroupRMS()
        gradients = self.ranks.gather(self.net, gradients)
        for name, p in self.held.items():
            p.grad = gradients.get(name)
            if p.grad is not None:
                if line_due:
                    sizes.add(name, p.grad)
                p.grad.mul_(min(1.0, r.grad_clip / (norm + 1e-6)))
        self.optim.step(r.lr_at(self.step), updates.add if line_due else None)
        self.ranks.spread(self.net, self.held)
        self.net.zero_grad()
        memory.after(batch.ids.numel(), RELEASE_EVERY)
        if objective.attention != "warmup":
            self._balance(loads)
        self.spikes.add(parts["loss"])
        shown: dict[str, Any] = {}
        if line_due:
            rms = {"grad_rms": sizes, "update_rms": updates}
            shown = {name: each.values(self.ranks.summed) for name, each in rms.items()}
            shown |= probe(self.net, self.ranks.parts(batch)[0], objective.numerics)
        self._ahead.popleft()
        self.step += 1
        self.tokens += batch.ids.numel()
        took = time.perf_counter() - began
        self.seconds += took
        worst = max((float(n.max() / n.float().mean()) for n in loads), default=1.0)
        parts |= {"grad_norm": norm, "worst_load": worst}
        self.averages.add(parts | {"tokens": float(batch.ids.numel()), "took": took}, loads)
        return shown

    def _gradients(
        self, batch: Batch, objective: Objective
    ) -> tuple[dict[str, float], list[Tensor]]:
        """Losses and each router's tokens per expert, of the whole batch; this rank's share of
        the gradients is left in ``grad``."""
        parts = self.ranks.parts(batch, self.recipe.tokens_per_pass)
        chosen: Sequence[list[Tensor] | None] = self._routes() or [None] * len(parts)
        values: dict[str, float] = defaultdict(float)
        loads = [torch.zeros(self.config.n_routed_experts, dtype=torch.int64) for _ in self.gates]
        for part, each in zip(parts, chosen, strict=True):
            share = Shares.of(part, batch)
            total, some, used = losses(self.net, *part, objective, each, share)
            total.backward()
            for name, value in some.items():
                values[name] += value
            for load, n in zip(loads, used, strict=True):
                load += n
        counts = [n for load in loads for n in load.tolist()]
        sums = self.ranks.summed([*values.values(), *counts])
        summed = torch.tensor(sums[len(values) :], dtype=torch.int64)
        return dict(zip(values, sums, strict=False)), list(summed.view(len(loads), -1))

    def _balance(self, loads: list[Tensor]) -> None:
        """Move the routers' biases towards even loads."""
        with torch.no_grad():
            for gate, load in zip(self.gates, loads, strict=True):
                assert gate.bias is not None
                gate.bias += self.recipe.bias_update * torch.sign(load.float().mean() - load)

    # ------------------------------------------------------------ spikes

    def _is_spike(self, loss: float, log: RunLog) -> bool:
        """Whether this step is given up and the run is back at an earlier one.

        A spike while routing is already anticipatory is let pass, unless it is not finite.
        """
        r = self.recipe
        if not self.spikes.is_spike(loss):
            return False
        event = {"event": "spike", "step": self.step, "loss": str(loss)}
        if self.step < self.anticipate_until:
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {self.step}, again after going back",
                    expected="a number",
                    got=loss,
                    hint="lower lr or raise warmup; the last good state is in "
                    f"{self.checkpoints.folder}",
                )
            log.write(event)
            return False
        event["limit"] = str(self.spikes.limit())
        until = self.step + r.anticipate_steps
        regular = self.checkpoints.regular()
        enough = [s for s in regular if s <= self.step - r.rollback] or regular[:1]
        self._load(enough[-1], self.checkpoints.facts(enough[-1]))
        self.checkpoints.drop_after(self.step)
        self.anticipate_until = until
        log.write(event | {"back_to": self.step, "anticipate_until": until})
        return True

    def _routes(self) -> list[list[Tensor]] | None:
        """This step's experts, pass by pass, chosen ``anticipate_delay`` steps ago; or None.

        When anticipation begins, the first steps share the parameters it begins with.
        """
        r = self.recipe
        end = min(self.anticipate_until, r.steps)
        if self.step >= end:
            return None
        while len(self.routes) <= r.anticipate_delay and self.step + len(self.routes) < end:
            parts = self.ranks.parts(self._coming(len(self.routes)), r.tokens_per_pass)
            objective = self.objective()
            self.routes.append(
                [routes(self.net, part.ids, part.lengths, objective) for part in parts]
            )
        return self.routes.popleft()

    # ------------------------------------------------------------ the run

    def data(self) -> Iterator[Batch]:
        """Batches from the present step on."""
        r, end = self.recipe, 0
        for stage in r.stages:
            begin, end = max(end, self.step), end + stage.steps
            if begin < end:
                stream = batches(
                    self.tokenizer, r.seed, r.tokens_at, r.length_at, begin,
                    weights=stage.shares or None,
                )  # fmt: skip
                yield from islice(stream, end - begin)

    def _coming(self, ahead: int) -> Batch:
        """The batch of the present step, or of one after it."""
        while len(self._ahead) <= ahead:
            self._ahead.append(next(self._stream))
        return self._ahead[ahead]

    def planned_bytes(self) -> int:
        """The most memory that a single process should need, by ``planner.training_peak_bytes``."""
        r = self.recipe
        return max(
            training_peak_bytes(
                self.config,
                min(stage.tokens_per_batch, r.tokens_per_pass or stage.tokens_per_batch),
                recompute=r.recompute,
                mtp=self.config.mtp_layers > 0 and stage.mtp_weight > 0,
                sparse=stage.attention != "dense",
                dtype=r.dtype,
            )
            for stage in r.stages
        )

    def train(self) -> None:
        """Go on to the last step and export. SIGINT or SIGTERM ends the step, saves and returns;
        a second one ends at once, and the last checkpoint counts."""
        r = self.recipe
        with self._signals() as stopped, Show(
            self.folder, r.steps, self.step, self.tensorboard and self.ranks.first
        ) as show:
            log = RunLog(self.folder, self._position, self.ranks)
            try:
                if not self.resumed:
                    log.write({"event": "start", "recipe": asdict(r), "differs": changes(r)})
                    self.save(log)
                while self.step < r.steps:
                    shown = self.train_step(log)
                    show.step(self.step)
                    if shown is not None and self.step % r.log_every == 0:
                        line = rounded(self._line() | shown)
                        log.write(line)
                        show.line(line)
                    stop = self.ranks.any(bool(stopped))
                    if stop or self.step % r.checkpoint_every == 0 or self.step == r.steps:
                        self.save(log)
                    if stop and self.step < r.steps:
                        print("stopped; the same command goes on from here", file=sys.stderr)
                        return
            except OSError as e:
                raise TrainingError(
                    f"cannot write into {self.folder}",
                    expected="a writable disk with some space",
                    got=e,
                    hint="free some space and give the same command again",
                ) from e
            finally:
                log.close()
        if self.ranks.first:
            self.export()
        self.ranks.wait()  # who leaves while others work may take the connection along

    def _line(self) -> dict[str, Any]:
        """The log line of the steps since the last one."""
        means, loads = self.averages.take()
        speed = means.pop("tokens") / means.pop("took")
        names = [
            name.removesuffix(".ffn.gate")
            for name, module in self.net.named_modules()
            if module in self.gates
        ]
        line: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        line |= {"lr": self.recipe.lr_at(self.step - 1)} | means
        return line | {"tokens_per_s": speed, "load": dict(zip(names, loads, strict=True))}

    @contextmanager
    def _signals(self) -> Iterator[list[int]]:
        """The signals to stop that have come; the second one interrupts."""
        came: list[int] = []

        def stop(number: int, _: object) -> None:
            if came:
                raise KeyboardInterrupt
            came.append(number)

        if threading.current_thread() is not threading.main_thread():
            yield came
            return
        handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield came
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------ files

    def _tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name."""
        return (
            {f"model.{name}": p.data for name, p in self.held.items()}
            | {f"optim.{name}": t for name, t in self.optim.state.items()}
            | {
                f"routes.{self.ranks.rank}.{ahead}.{part}.{gate}": t
                for ahead, parts in enumerate(self.routes)
                for part, gates in enumerate(parts)
                for gate, t in enumerate(gates)
            }
        )

    def save(self, log: RunLog) -> None:
        """Make a checkpoint of the present step, unless there is one."""
        if self.step == self._saved:
            return
        facts = {
            "config": fingerprint(self.config.to_dict()),
            "past": self.recipe.past(self.step),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "losses": list(self.spikes.losses),
            "averages": self.averages.state(),
            "anticipate_until": self.anticipate_until,
            "routes": len(self.routes),
            "ranks": self.ranks.size,
            "log": log.position(),
        }
        self.checkpoints.save(self.step, self._tensors(), facts)
        self._saved = self.step

    def _resume(self) -> bool:
        """Take the newest checkpoint that is whole, if any."""
        damaged: dict[int, TrainingError] = {}
        for step in reversed(self.checkpoints.steps()):
            try:
                facts = self.checkpoints.facts(step)
            except TrainingError as e:
                damaged[step] = e
                continue
            if facts["config"] != fingerprint(self.config.to_dict()):
                raise TrainingError(
                    f"{self.folder} is a run of another model",
                    expected="the recipe's configuration",
                    hint="give another --out folder",
                )
            past = self.recipe.past(step)
            then = Recipe().past(0) | facts["past"]  # keys that did not exist had their default
            changed = [k for k in past if past[k] != then.get(k)]
            if changed:
                raise TrainingError(
                    f"{self.folder} was trained to step {step} by another recipe",
                    expected="the same values up to there; stages to come may differ",
                    got=f"others in {', '.join(changed)}",
                    hint="give another --out folder, or put the change into a new stage",
                )
            for later, why in damaged.items():
                self.checkpoints.put_aside(later)
                if self.ranks.first:
                    print(f"{why}\n  going on from step {step}", file=sys.stderr)
            self._load(step, facts)
            return True
        if damaged:
            raise TrainingError(
                f"no checkpoint in {self.checkpoints.folder} can be used",
                expected="at least one that is whole",
                got="\n".join(map(str, damaged.values())),
                hint="delete that folder to start over",
            )
        return False

    def _load(self, step: int, facts: dict[str, Any]) -> None:
        self.step = self._saved = step
        self._ahead.clear()
        self._stream = self.data()
        # of other parts of the batches they are of no use, and made anew
        kept = facts["routes"] if facts["ranks"] == self.ranks.size else 0
        self.routes = deque(self._blank_routes(ahead) for ahead in range(kept))
        self.checkpoints.load(step, self._tensors())
        self.ranks.spread(self.net, self.held)
        self.tokens, self.seconds = facts["tokens"], facts["seconds"]
        self.spikes.losses.clear()
        self.spikes.losses.extend(facts["losses"])
        self.averages = Averages(facts["averages"])
        self.anticipate_until = facts["anticipate_until"]
        self._position = facts["log"]

    def _blank_routes(self, ahead: int) -> list[list[Tensor]]:
        """As many zeros as the routes of a coming step."""
        blank = []
        for part in self.ranks.parts(self._coming(ahead), self.recipe.tokens_per_pass):
            rows = [part.ids.numel()] * len(self.gates)
            if self.net.mtp:
                rows[-1] -= len(part.lengths)  # its gate sees the tokens that have a successor
            k = self.config.num_experts_per_tok
            blank.append([torch.zeros(n, k, dtype=torch.int64) for n in rows])
        return blank

    def export(self) -> None:
        """Write ``parent/`` (BF16) and ``model/`` (official instruct format)."""
        net = self.net
        if self.ranks.size > 1:  # this rank may hold but a part; the last checkpoint is whole
            net = Transformer(self.config)
            init_weights(net, self.recipe.seed)
            whole = {f"model.{name}": t for name, t in net.state_dict().items()}
            self.checkpoints.load(self.step, whole, alone=True)
        export(net, self.folder / "parent", _float_config(self.config), self.tokenizer)
        export(net, self.folder / "model", self.config, self.tokenizer)


@torch.no_grad()
def start_from(net: Transformer, model: str | Path) -> None:
    """Give a model that has float masters the weights of a checkpoint: a folder, or a shipped
    model's name. TrainingError when it has another shape; how it is stored does not matter."""
    stored = Checkpoint.open(find_model(model))

    def shape(config: V4Config) -> dict[str, Any]:
        storage = ("expert_dtype", "quantization_config", "torch_dtype")
        return {k: v for k, v in config.to_dict().items() if k not in storage}

    ours, theirs = shape(net.config), shape(stored.config)
    differ = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if differ:
        raise TrainingError(
            f"{model} is not of this recipe's shape",
            expected=", ".join(f"{k} {ours.get(k)}" for k in differ),
            got=", ".join(f"{k} {theirs.get(k)}" for k in differ),
            hint="change preset and [model], or leave out weights",
        )
    for name, parameter in net.named_parameters():
        scale = name.removesuffix("weight") + "scale"
        weight = stored.tensor(name)
        scales = stored.tensor(scale) if scale in stored.specs else None
        parameter.copy_(quant.dequantize(weight, scales) if weight.dtype != torch.int64 else weight)


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

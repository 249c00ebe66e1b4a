"""``dsv4 train ablations``: what each part of the recipe is worth, trained, measured and drawn.

A folder holds ``base.toml``, a recipe, and questions: TOML files with a ``title``, an ``about``,
the list ``shows``, a ``[base]`` that differs from the recipe for all and ``[variants.X]`` that
differ for X alone. A variant is trained once for each seed, all with one tokenizer; the same run in
two questions is made once. A run's measurements are in its ``result.json``; a run that has one is
not repeated, and one that was killed goes on, so the command can be given again at any time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..errors import TrainingError
from ..kernels import reference
from ..model import Transformer
from ..tokenizer import Tokenizer
from .data import HELD_OUT, Batch, corpus_for_tokenizer, document, render
from .generators.document import rng_for
from .generators.needles import recall
from .loop import DTYPES, Run
from .losses import Objective, losses
from .plots import course
from .recipes import Recipe, fingerprint, read_toml
from .runfiles import read_log
from .watch import recorded_mixing

SHOWS = ("loss", "stored", "recall", "growth", "load")
RECALL = (128, 256, 512, 1024, 2048)  # tokens of the texts
HELD_OUT_TOKENS = 32_768
SCARCE = 0.1  # of its even share: an expert with less is hardly used
Receipt = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A recipe with a name; ``free``: without the constraint on the streams' mixing."""

    name: str
    recipe: Recipe
    free: bool = False

    def seeded(self, seed: int) -> Variant:
        """The same with another seed."""
        return replace(self, recipe=replace(self.recipe, seed=seed))

    @property
    def key(self) -> str:
        """What is trained, in short; equal for equal runs."""
        return fingerprint(asdict(self.recipe) | {"free": self.free})[:12]


@dataclass(frozen=True)
class Question:
    """Variants to compare, the first with each of the others, by what ``shows`` names."""

    name: str
    title: str
    about: str
    shows: tuple[str, ...]
    variants: tuple[Variant, ...]


def questions(folder: Path) -> list[Question]:
    """The questions of a folder, by name; TrainingError for a file that is not one."""
    base = read_toml(folder / "base.toml")
    files = sorted(file for file in folder.glob("*.toml") if file.stem != "base")
    return [_question(file, base) for file in files]


def _question(file: Path, base: Mapping[str, Any]) -> Question:
    data = read_toml(file)
    keys = ("title", "about", "shows", "base", "variants")
    shows, tables = data.get("shows", ["loss"]), data.get("variants", {})
    if unknown := sorted({*data} - {*keys}):
        raise TrainingError(f"{file} has keys that it cannot have", expected=keys, got=unknown)
    if not tables or not set(shows) <= {*SHOWS}:
        raise TrainingError(
            f"{file} is not a question", expected=f"[variants.X], shows of {SHOWS}", got=shows
        )
    start = _merged(base, data.get("base", {}))
    variants = []
    for name, table in tables.items():
        changes = dict(table)
        mixing = changes.pop("mixing", "")
        if mixing not in ("", "unconstrained"):
            raise TrainingError(f"{file}: mixing", expected="unconstrained", got=mixing)
        recipe = Recipe.of(_merged(start, changes), f"{file}: {name}")
        recipe.config()
        variants.append(Variant(name, recipe, bool(mixing)))
    about = " ".join(str(data.get("about", "")).split())
    return Question(file.stem, str(data.get("title", file.stem)), about, (*shows,), (*variants,))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    model = dict(base.get("model", {})) | dict(changes.get("model", {}))
    return {**base, **changes, "model": model}


# ------------------------------------------------------------------ runs


def run(
    asked: Sequence[Question],
    out: Path,
    seeds: Sequence[int] = (0, 1, 2),
    say: Callable[[str], object] = print,
) -> list[Receipt]:
    """Train and measure what has not been, seed by seed; the receipts of all that has.

    Returns early, with fewer, when a run is stopped by a signal.
    """
    out.mkdir(parents=True, exist_ok=True)
    todo: dict[str, tuple[str, Variant]] = {}
    for seed in seeds:
        for question in asked:
            for variant in question.variants:
                seeded = variant.seeded(seed)
                todo.setdefault(seeded.key, (f"{question.name}: {variant.name}, {seed=}", seeded))
    for number, (key, (name, variant)) in enumerate(todo.items(), 1):
        folder = out / key
        if (folder / "result.json").exists():
            continue
        say(f"{number} of {len(todo)}: {name} ({folder})")
        receipt = _trained(variant, folder, _tokenizer(variant.recipe, out))
        if receipt is None:
            break
        fresh = folder / ".result.new"
        fresh.write_text(json.dumps(receipt))
        fresh.rename(folder / "result.json")
        for part in ("checkpoints", "parent", "model"):
            shutil.rmtree(folder / part, ignore_errors=True)
    done = (out / key / "result.json" for key in todo)
    return [json.loads(file.read_text()) for file in done if file.exists()]


def _tokenizer(recipe: Recipe, out: Path) -> Path:
    """The folder of the one tokenizer of all runs with this vocabulary."""
    size = recipe.config().vocab_size
    folder = out / f"tokenizer-{size}-{recipe.vocab_documents}"
    if not folder.exists():
        fresh = out / ".tokenizer.new"
        shutil.rmtree(fresh, ignore_errors=True)
        corpus = corpus_for_tokenizer(0, recipe.vocab_documents)
        Tokenizer.train(corpus, size, progress=False).save(fresh)
        fresh.rename(folder)
    return folder


def _trained(variant: Variant, folder: Path, tokenizer: Path) -> Receipt | None:
    """The receipt of a run that goes to its end; None of one that is stopped."""
    if not (folder / "tokenizer").exists():
        shutil.copytree(tokenizer, folder / "tokenizer")
    with _unconstrained() if variant.free else nullcontext():
        with Run(variant.recipe, folder) as one:
            one.train()
            if one.step < variant.recipe.steps:
                return None
            measured = measure(one.net, one.tokenizer, variant.recipe)
            seconds, tokens = one.seconds, one.tokens
    lines, spikes = course(read_log(folder))
    counts = variant.recipe.config().parameter_counts()
    return {
        "key": variant.key,
        "seed": variant.recipe.seed,
        "parameters": counts.total,
        "active": counts.active,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "spikes": len(spikes),
        "curve": [[x["tokens"], round(x["loss"], 4), round(x["worst_load"], 3)] for x in lines],
        **measured,
    }


@contextmanager
def _unconstrained() -> Iterator[None]:
    """Meanwhile mHC's mixing matrix is the identity plus what is learned: no softmax, no Sinkhorn.

    It starts as mHC does: the logits' first base is four times the identity.
    """
    read, sinkhorn = kernels.hc_read, kernels.sinkhorn

    def free_read(
        streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x, post, _ = read(streams, fn, scale, base, eps, norm_eps, dtype)
        h = streams.shape[-2]
        logits = reference.hc_logits(streams, fn[2 * h :], norm_eps) * scale[2] + base[2 * h :]
        return x, post, logits.unflatten(-1, (h, h)) - 3 * torch.eye(h)

    kernels.hc_read = free_read
    kernels.sinkhorn = lambda comb, iters, eps: comb
    try:
        yield
    finally:
        kernels.hc_read, kernels.sinkhorn = read, sinkhorn


# ------------------------------------------------------------------ measurements


@torch.no_grad()
def measure(net: Transformer, tokenizer: Tokenizer, recipe: Recipe) -> Receipt:
    """What a trained model does with held-out documents of the kinds it ends with.

    ``loss`` and ``stored_loss``: nats a token, with the weights as they are and as they are stored.
    ``streams``: RMS of the residual streams after the embedding and after each block; ``gain``: the
    largest row or column sum of the product of all mixing matrices up to a block, mean over tokens.
    ``busiest``: load of the busiest expert of any router, in even shares; ``scarce``: the share of
    experts with less than a tenth of theirs. ``recall``, where it was trained: by length, the share
    of answers that are right to the last token.
    """
    objective = Objective(
        mtp_weight=0.0, attention=recipe.stages[-1].attention, index_weight=0.0,
        dtype=DTYPES[recipe.dtype],
    )  # fmt: skip
    sums, weight, loads = {False: 0.0, True: 0.0}, 0.0, []
    batches = list(_held_out(tokenizer, recipe))
    for batch in batches:
        counted = float(batch.weights.sum())
        weight += counted
        for stored in sums:
            _, parts, used = losses(net, *batch, replace(objective, qat=stored))
            sums[stored] += parts["loss"] * counted
            if not stored:
                loads.append(torch.stack(used))
    load = torch.stack(loads).sum(0).float()  # [gates, experts]
    load /= load.mean(1, keepdim=True)
    streams, gains = _depth(net, batches[0], objective)
    out: Receipt = {
        "loss": round(sums[False] / weight, 5),
        "stored_loss": round(sums[True] / weight, 5),
        "streams": streams,
        "gain": gains,
        "busiest": round(float(load.max()), 3),
        "scarce": round(float((load < SCARCE).float().mean()), 4),
    }
    if "recall" in recipe.stages[-1].shares:
        out["recall"] = {str(n): _recalled(net, tokenizer, objective, n) for n in RECALL}
    return out


def _held_out(tokenizer: Tokenizer, recipe: Recipe) -> Iterator[Batch]:
    """The same documents for every run with the same data: about HELD_OUT_TOKENS tokens."""
    stage = recipe.stages[-1]
    shares = {k: w for k, w in (stage.shares or HELD_OUT).items() if k in HELD_OUT}
    row: list[tuple[list[int], list[float]]] = []
    tokens = used = 0
    for number in count():
        ids, weights = render(document(number, 0, "heldout", shares, stage.length - 80), tokenizer)
        if len(ids) > stage.tokens_per_batch:
            continue
        if used + len(ids) > stage.tokens_per_batch:
            yield Batch(
                torch.tensor([[i for each, _ in row for i in each]]),
                torch.tensor([[w for _, each in row for w in each]]),
                tuple(len(each) for each, _ in row),
            )
            tokens, used, row = tokens + used, 0, []
            if tokens >= HELD_OUT_TOKENS:
                return
        row.append((ids, weights))
        used += len(ids)


def _depth(
    net: Transformer, batch: Batch, objective: Objective
) -> tuple[list[float], list[float]]:
    """``streams`` and ``gain`` of ``measure``."""
    run = net.start(batch.ids, objective.numerics, lengths=batch.lengths)
    run.dense = objective.attention != "sparse"
    kept: list[Tensor] = []
    with recorded_mixing() as matrices:
        net.trunk(run, kept)
    first = net.embed(batch.ids, torch.float32)
    rms = [float(x.float().square().mean().sqrt()) for x in (first, *kept)]
    product, gains = None, []
    for number, matrix in enumerate(matrices, 1):
        flat = matrix.flatten(0, -3).double()
        product = flat if product is None else product @ flat
        if number % 2 == 0:  # two sites a block
            sums = torch.cat([product.abs().sum(axis) for axis in (-1, -2)], -1)
            gains.append(float(sums.amax(-1).mean()))
    return [float(f"{x:.5g}") for x in rms], [float(f"{x:.5g}") for x in gains]


def _recalled(
    net: Transformer, tokenizer: Tokenizer, objective: Objective, length: int, n: int = 50
) -> float:
    """The share of ``n`` held-out recall texts of ``length`` tokens whose answer is the likeliest
    one, token by token: what greedy decoding says then."""
    right = 0
    for number in range(n):
        rng = rng_for("ablations", length, number)
        doc = recall(rng, "heldout", length=length, keys=1, thinking=False)
        ids, weights = render(doc, tokenizer)
        run = net.start(torch.tensor([ids]), objective.numerics)
        run.dense = objective.attention != "sparse"
        wanted = [i for i, w in enumerate(weights) if w > 0]
        streams = net.trunk(run)[0, [i - 1 for i in wanted]]
        said = net.logits(streams, run).argmax(-1).tolist()
        right += said == [ids[i] for i in wanted]
    return right / n

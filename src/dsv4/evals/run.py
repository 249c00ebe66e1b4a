"""Running the tasks on a model: accuracies with intervals, and the loss on held-out documents."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..encoding import encode_segments
from ..engine.sample import SamplingParams
from ..errors import ConfigError
from ..tokenizer import Tokenizer
from ..train.data import document, render
from ..train.generators.document import rng_for
from ..train.generators.talk import dialogue
from ..train.text import SOURCES, corpus, present
from .tasks import find_task, instance, usual


class ChatModel(Protocol):
    """What ``evaluate`` asks of a model: ``dsv4.Model``, or any stand-in for a test."""

    def chat(
        self,
        messages: Any,
        thinking: str = ...,
        tools: Any = ...,
        *,
        max_tokens: int = ...,
        temperature: float = ...,
    ) -> Mapping[str, Any]: ...


class DraftingModel(Protocol):
    """What ``draft_acceptance`` asks of a model."""

    def generate(self, prompt_ids: Any, params: Any = ...) -> list[int]: ...

    def mtp_logits(self, ids: Any) -> torch.Tensor: ...


class LogitsModel(Protocol):
    """What ``heldout_loss`` and ``bits_per_byte`` ask of a model."""

    def logits(self, ids: Any) -> torch.Tensor: ...


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval (or that of another ``z``) of a proportion; (0, 1) without trials."""
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def evaluate(
    model: ChatModel,
    seed: int = 0,
    n: int = 100,
    tasks: Sequence[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    thinking: str | None = None,
) -> dict[str, Any]:
    """Greedy accuracy on ``n`` held-out instances of each task.

    Returns ``{"seed", "n", "tasks": {name: {"correct", "n", "accuracy", "interval", "chance",
    "thinking"}}}`` with ``interval`` the 95% Wilson interval and ``chance`` what guessing gets.
    ``tasks`` are names (default: all but those with more than 3,000 tokens of prompt), ``thinking``
    replaces the tasks' own efforts, and ``progress(task, done, correct)`` is called after every
    reply. Prompt lengths are exact when the model has a ``tokenizer``.

    Raises ConfigError for an unknown task and for ``n`` below 1.
    """
    if n < 1:
        raise ConfigError("nothing to evaluate", expected="n of at least 1", got=n)
    chosen = [find_task(name) for name in (usual() if tasks is None else tasks)]
    tokenizer = getattr(model, "tokenizer", None)
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else None
    results: dict[str, Any] = {}
    for task in chosen:
        effort, correct = thinking or task.thinking, 0
        for number in range(n):
            asked = instance(task.name, seed, number, effort, tokenizer)
            reply = model.chat(
                asked.messages,
                thinking=effort,
                tools=asked.tools,
                max_tokens=task.max_tokens,
                temperature=0.0,
            )
            correct += task.check(asked, reply)
            if progress:
                progress(task.name, number + 1, correct)
        results[task.name] = {
            "correct": correct,
            "n": n,
            "accuracy": correct / n,
            "interval": list(wilson(correct, n)),
            "chance": task.chance,
            "thinking": effort,
        }
    return {"seed": seed, "n": n, "tasks": results}


@torch.inference_mode()
def heldout_loss(
    model: LogitsModel, tokenizer: Tokenizer, seed: int = 0, n: int = 100, longest: int = 1000
) -> dict[str, float]:
    """Mean loss, in nats per trained token, of ``n`` held-out documents.

    Keys are the data's tasks that occurred and ``"all"``, the mean over all tokens. Recall texts
    aim at ``longest`` tokens at most.
    """
    sums: dict[str, list[float]] = {}
    for i in range(n):
        doc = document(i, seed, "heldout", longest=longest)
        ids, weights = render(doc, tokenizer)
        logits = model.logits(ids)[:-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits, torch.tensor(ids[1:], device=logits.device), reduction="none"
        )
        weight = torch.tensor(weights[1:], device=logits.device)
        for key in (doc.task, "all"):
            total = sums.setdefault(key, [0.0, 0.0])
            total[0] += float(loss @ weight)
            total[1] += float(weight.sum())
    return {key: loss / count for key, (loss, count) in sums.items()}


ENGLISH = tuple(name for name in SOURCES if name != "python")


def measures(
    model: Any, tokenizer: Tokenizer, seed: int = 0, n: int = 100, names: Sequence[str] = ()
) -> dict[str, Any]:
    """What is measured beside the tasks' accuracies, by name (``MEASURES``; default: all).

    ``heldout_loss`` and ``draft_acceptance`` are those functions' (the latter only of a model with
    an MTP block), ``bits_per_byte`` that of each English text that is installed.
    """
    out: dict[str, Any] = {}
    for name in names or MEASURES:
        if name == "heldout_loss":
            out[name] = heldout_loss(model, tokenizer, seed, n)
        elif name == "bits_per_byte":
            texts = [text for text in present() if text in ENGLISH]
            out[name] = {text: bits_per_byte(model, tokenizer, text, seed, n) for text in texts}
        elif model.config.mtp_layers:
            out[name] = draft_acceptance(model, tokenizer, seed, n)
    return out


MEASURES = ("heldout_loss", "bits_per_byte", "draft_acceptance")


def heldout_texts(text: str, seed: int = 0, n: int = 50) -> list[str]:
    """Up to ``n`` held-out documents of a source of train/text.py; another seed draws others.

    Raises TrainingError for a text that is not installed.
    """
    documents = corpus(text).heldout
    return rng_for("bits", text, seed).sample(documents, min(n, len(documents)))


@torch.inference_mode()
def bits_per_byte(
    model: LogitsModel,
    tokenizer: Tokenizer,
    text: str,
    seed: int = 0,
    n: int = 50,
    longest: int = 2000,
) -> dict[str, float]:
    """Bits that the model needs for a byte of ``heldout_texts``, up to ``longest`` tokens of each.

    Returns ``bits``, comparable between vocabularies, ``chance``, what a model needs that holds all
    tokens for equally likely, and ``bytes``, how many were read.
    """
    nats, guessed, size = 0.0, 0.0, 0
    for passage in heldout_texts(text, seed, n):
        ids = [tokenizer.bos_id, *tokenizer.encode(passage)[: longest - 1]]
        size += sum(len(tokenizer.token_bytes(i)) for i in ids[1:])
        logits = model.logits(ids)[:-1].float()
        targets = torch.tensor(ids[1:], device=logits.device)
        nats += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        guessed += len(targets) * math.log(logits.shape[-1])
    bits = math.log(2) * size
    return {"bits": nats / bits, "chance": guessed / bits, "bytes": size}


def draft_acceptance(
    model: DraftingModel, tokenizer: Tokenizer, seed: int = 0, n: int = 50, longest: int = 100
) -> dict[str, Any]:
    """How often the MTP block drafts what the model says, greedily, in held-out dialogues.

    The model answers the last turn of ``n`` dialogues with up to ``longest`` tokens; of each token
    from the second one on (the end of the reply too) the draft is made one token before. Returns
    ``accepted``, ``drafts``, ``acceptance``, its 95% ``interval``, and ``chance``: what always
    drafting the token that the replies use most would get.
    """
    accepted, said = 0, Counter[int]()
    for number in range(n):
        doc = dialogue(rng_for("drafts", seed, number), "heldout")
        prompt = tokenizer.encode_segments(encode_segments(doc.messages[:-1], "chat"))
        limit = SamplingParams(temperature=0.0, max_tokens=longest)
        reply = model.generate(prompt, limit)
        if len(reply) < longest:
            reply = [*reply, tokenizer.eos_id]
        ids, drafted = [*prompt, *reply], reply[1:]
        if drafted:
            drafts = model.mtp_logits(ids)[len(prompt) - 1 :].argmax(-1).tolist()
            accepted += sum(map(int.__eq__, drafts, drafted))
            said.update(drafted)
    total = said.total()
    return {
        "accepted": accepted,
        "drafts": total,
        "acceptance": accepted / max(1, total),
        "interval": list(wilson(accepted, total)),
        "chance": max(said.values(), default=0) / max(1, total),
    }

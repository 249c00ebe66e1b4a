"""Running the tasks on a model: accuracies with intervals, and the loss on held-out documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..errors import ConfigError
from ..tokenizer import Tokenizer
from ..train.data import document, render
from ..train.text import corpus
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


class LogitsModel(Protocol):
    """What ``heldout_loss`` asks of a model."""

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


@torch.inference_mode()
def bits_per_byte(
    model: LogitsModel, tokenizer: Tokenizer, text: str, n: int = 50, longest: int = 2000
) -> float:
    """Bits that the model needs for a byte of held-out running text, from a source of
    train/text.py: the first ``n`` of its held-out documents, up to ``longest`` tokens of each.

    Comparable between vocabularies. Raises TrainingError for a text that is not installed.
    """
    nats, size = 0.0, 0
    for passage in corpus(text).heldout[:n]:
        ids = [tokenizer.bos_id, *tokenizer.encode(passage)[: longest - 1]]
        size += sum(len(tokenizer.token_bytes(i)) for i in ids[1:])
        logits = model.logits(ids)[:-1].float()
        targets = torch.tensor(ids[1:], device=logits.device)
        nats += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return nats / math.log(2) / size

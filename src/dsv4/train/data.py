"""The training data of v4-nano as a counted stream: documents, token ids with weights, batches.

Nothing is stored. Document ``i`` of a stream depends on ``(seed, split, i)`` and on nothing else,
and batch ``k`` on ``(seed, k)``, so a run resumes by number. What the documents say is in
``conversations``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import torch

from ..encoding import (
    ASSISTANT,
    END_THINK,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    THINK,
    encode_messages,
    encode_segments,
)
from ..errors import TrainingError
from .conversations import TASKS, Document, Split, recall, rng_for

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

# Documents per task, relative. In tokens recall and arithmetic lead, because they are the longest
# and the most numerous.
WEIGHTS: Mapping[str, float] = {
    "arithmetic": 36,
    "number_facts": 10,
    "recall": 15,
    "json_extract": 9,
    "tool_call": 6,
    "dialogue": 32,
}
HELD_OUT: Mapping[str, float] = {k: v for k, v in WEIGHTS.items() if k != "number_facts"}

# ------------------------------------------------------------------ streams


def document(
    index: int,
    seed: int,
    split: Split = "train",
    weights: Mapping[str, float] | None = None,
    longest: int = 2000,
) -> Document:
    """Document ``index`` of a stream: the same for the same arguments, without its predecessors.

    ``weights`` are relative numbers of documents per task (default ``WEIGHTS``, or ``HELD_OUT``:
    number facts have no held-out part); ``longest`` is the most tokens a recall prompt aims at
    (20 to 30 more with the answers).
    """
    rng = rng_for("document", seed, split, index)
    shares = weights or (WEIGHTS if split == "train" else HELD_OUT)
    task = rng.choices(list(shares), list(shares.values()))[0]
    if task == "recall":
        return recall(rng, split, longest=longest)
    return TASKS[task](rng, split)


def documents(
    seed: int,
    split: Split = "train",
    weights: Mapping[str, float] | None = None,
    longest: int = 2000,
) -> Iterator[Document]:
    """The endless stream ``document(0), document(1), ...``."""
    return (document(i, seed, split, weights, longest) for i in count())


# ------------------------------------------------------------------ tokens and their weights


def render(
    doc: Document, tokenizer: Tokenizer, prompt_weight: float = 0.0
) -> tuple[list[int], list[float]]:
    """Token ids of the whole conversation and one loss weight per id, as a target.

    Weight 1 is on what the assistant has to produce: reasoning, ``</think>``, content, tool calls
    and EOS, not the ``<think>`` or ``</think>`` with which the prompt ends. All other tokens weigh
    ``prompt_weight``, and BOS, which nothing predicts, 0. In thinking mode without tools only the
    last turn counts: the ones before are shown without their reasoning, as no model wrote them.
    """
    segments = encode_segments(
        doc.messages, doc.thinking_mode, reasoning_effort=doc.reasoning_effort
    )
    ids = tokenizer.encode_segments(segments)
    assistant, end = tokenizer.special_id(ASSISTANT), tokenizer.special_id(EOS)
    opening = tokenizer.special_id(THINK if doc.thinking_mode == "thinking" else END_THINK)
    weights = [prompt_weight] * len(ids)
    weights[0] = 0.0
    inside = False
    for i in range(2, len(ids)):
        # A turn is trained if it opens as a generation in this mode opens.
        inside = inside or (ids[i - 2] == assistant and ids[i - 1] == opening)
        if inside:
            weights[i] = 1.0
            inside = ids[i] != end
    return ids, weights


def ramp(start: int, end: int, batches: int) -> Callable[[int], int]:
    """A ``max_length`` that grows with the batch number from ``start`` to ``end`` in ``batches``.

    It grows by a constant factor per batch and stays at ``end`` afterwards.
    """

    def at(batch: int) -> int:
        done = min(1.0, batch / max(1, batches))
        return round(start * math.exp(done * math.log(end / start)))

    return at


POOL = 64  # batches that are drawn, sorted by length and shuffled together


def batches(
    tokenizer: Tokenizer,
    seed: int,
    tokens_per_batch: int = 4096,
    max_length: int | Callable[[int], int] = 2048,
    start_batch: int = 0,
    *,
    weights: Mapping[str, float] | None = None,
    prompt_weight: float = 0.0,
    multiple: int = 8,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids ``[B, T]`` int64, loss weights ``[B, T]`` float32) of the train split.

    A row is one document from its BOS on, padded on the right with PAD at weight 0; the rows of
    a batch have similar lengths, ``B * T <= tokens_per_batch`` and ``T`` is a multiple of
    ``multiple``; a document too long for a batch is left out.

    ``max_length`` (tokens, may depend on the batch number, see ``ramp``) bounds the recall
    documents, the only long ones; others may have some 700. It is read once for each ``POOL``
    batches. Batch k depends on the arguments and k alone, so training resumes with
    ``start_batch``, at the cost of one pool at most.

    Raises TrainingError when ``max_length`` is below 64 or more than a batch holds.
    """
    pad = tokenizer.special_id(PAD)
    k = start_batch
    while True:
        limit = max_length(k - k % POOL) if callable(max_length) else max_length
        if limit < 64 or _up(limit, multiple) > tokens_per_batch:
            raise TrainingError(
                "max_length does not suit tokens_per_batch",
                expected=f"64 to {tokens_per_batch}",
                got=limit,
                hint="raise tokens_per_batch or lower max_length",
            )
        pool = _pool(
            tokenizer, seed, k // POOL, tokens_per_batch, limit, weights, prompt_weight, multiple
        )
        for rows in pool[k % POOL :]:
            width = _up(max(len(ids) for ids, _ in rows), multiple)
            ids = torch.full((len(rows), width), pad, dtype=torch.int64)
            loss = torch.zeros(len(rows), width)
            for r, (row, row_weights) in enumerate(rows):
                ids[r, : len(row)] = torch.tensor(row)
                loss[r, : len(row)] = torch.tensor(row_weights)
            yield ids, loss
            k += 1


Row = tuple[list[int], list[float]]


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _pool(
    tokenizer: Tokenizer,
    seed: int,
    number: int,
    tokens_per_batch: int,
    limit: int,
    weights: Mapping[str, float] | None,
    prompt_weight: float,
    multiple: int,
) -> list[list[Row]]:
    """Pool ``number``: exactly POOL batches of rows of similar length, in random order."""

    def padded(row: Row) -> int:
        return _up(len(row[0]), multiple)

    rows: list[Row] = []
    total = 0
    stream = count(number << 24)  # more documents than a pool can use
    while total < POOL * tokens_per_batch:  # so that at least POOL batches come out
        doc = document(next(stream), seed, "train", weights, max(48, limit - 80))
        row = render(doc, tokenizer, prompt_weight)
        if padded(row) <= (limit if doc.task == "recall" else tokens_per_batch):
            rows.append(row)
            total += padded(row)
    rng = rng_for("pool", seed, number)
    rng.shuffle(rows)
    rows.sort(key=padded, reverse=True)
    cut: list[list[Row]] = [[]]
    for row in rows:
        first = cut[-1][0] if cut[-1] else row
        if (len(cut[-1]) + 1) * padded(first) > tokens_per_batch:
            cut.append([])
        cut[-1].append(row)
    rng.shuffle(cut)
    return cut[:POOL]


# ------------------------------------------------------------------ vocabulary and summary

_CORPUS: Mapping[str, float] = {  # many short documents: rare words have to earn their merges
    "arithmetic": 10,
    "recall": 12,
    "json_extract": 16,
    "tool_call": 12,
    "dialogue": 50,
}


def corpus_for_tokenizer(seed: int, n: int) -> Iterator[str]:
    """Texts of ``n`` rendered conversations, from which the vocabulary of v4-nano is trained.

    Cut at the special tokens, so that no merge is spent on their spelling.
    """
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    for i in range(n):
        doc = document(i, seed, "train", _CORPUS, 250)
        text = encode_messages(
            doc.messages, doc.thinking_mode, reasoning_effort=doc.reasoning_effort
        )
        yield from filter(None, special.split(text))


@dataclass
class TaskStats:
    """Sums over the documents of one task; ``trained`` counts tokens of loss weight 1."""

    documents: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0

    @property
    def mean_length(self) -> float:
        return self.tokens / max(1, self.documents)


def stats(
    seed: int, n: int, tokenizer: Tokenizer, weights: Mapping[str, float] | None = None
) -> dict[str, TaskStats]:
    """What the first ``n`` documents of the train split consist of, by task."""
    out = {task: TaskStats() for task in (WEIGHTS if weights is None else weights)}
    for i in range(n):
        doc = document(i, seed, "train", weights)
        ids, loss = render(doc, tokenizer)
        row = out[doc.task]
        row.documents += 1
        row.tokens += len(ids)
        row.trained += sum(w == 1 for w in loss)
        row.longest = max(row.longest, len(ids))
    return out

"""The training data of v4-nano as a counted stream: documents, token ids with weights, batches.

Nothing is stored. Document ``i`` of a stream depends on ``(seed, split, i)`` and on nothing else,
and batch ``k`` on ``(seed, k)``, so a run resumes by number. What the documents say is in
``generators``, and in ``text`` for those that come from installed packages (then the packages are
part of what a document depends on).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..encoding import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    PAD,
    SPECIAL_TOKENS,
    THINK,
    encode_messages,
    encode_segments,
)
from ..errors import TrainingError
from .generators import TASKS
from .generators.document import Document, Split, rng_for
from .generators.needles import key_value, multi_needle, recall
from .text import ANY_TEXT, LEXICON, SOURCES, Passage, corpus, lexicon, passage

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

# Documents per task, relative.
WEIGHTS: Mapping[str, float] = {
    "arithmetic": 20,
    "number_facts": 6,
    "times_table": 4,
    "addition": 10,
    "subtraction": 6,
    "word_problem": 8,
    "units": 5,
    "dates": 5,
    "sorting": 6,
    "letters": 6,
    "recall": 10,
    "multi_needle": 4,
    "key_value": 4,
    "json_extract": 6,
    "json_nested": 4,
    "json_convert": 4,
    "tool_call": 6,
    "code_output": 6,
    "dictionary": 10,
    "knowledge": 10,
    "dialogue": 25,
    "everyday": 25,
}
_SHOWN = ("number_facts", "times_table")  # nothing of them is held out
HELD_OUT: Mapping[str, float] = {k: v for k, v in WEIGHTS.items() if k not in _SHOWN}
KINDS = (*TASKS, LEXICON, *SOURCES, ANY_TEXT)  # what shares can name
_LONG: Mapping[str, Callable[..., Document]] = {  # tasks whose length is chosen
    "recall": recall,
    "multi_needle": multi_needle,
    "key_value": key_value,
}

# ------------------------------------------------------------------ streams


def document(
    index: int,
    seed: int,
    split: Split = "train",
    weights: Mapping[str, float] | None = None,
    longest: int = 2000,
) -> Document | Passage:
    """Document ``index`` of a stream: the same for the same arguments, without its predecessors.

    ``weights`` are relative numbers of documents by kind (``KINDS``; default ``WEIGHTS``, or
    ``HELD_OUT``: one-digit facts have no held-out part); ``longest`` is the most tokens that the
    prompts of recall aim at (20 to 30 more with the answers).

    Raises TrainingError for an unknown kind, and for a text that is not installed.
    """
    rng = rng_for("document", seed, split, index)
    shares = weights or (WEIGHTS if split == "train" else HELD_OUT)
    task = rng.choices(list(shares), list(shares.values()))[0]
    if task in _LONG:
        return _LONG[task](rng, split, longest=longest)
    if task == LEXICON:
        return lexicon(rng, split)
    return TASKS[task](rng, split) if task in TASKS else passage(rng, split, task)


def documents(
    seed: int,
    split: Split = "train",
    weights: Mapping[str, float] | None = None,
    longest: int = 2000,
) -> Iterator[Document | Passage]:
    """The endless stream ``document(0), document(1), ...``."""
    return (document(i, seed, split, weights, longest) for i in count())


# ------------------------------------------------------------------ tokens and their weights


Sample = tuple[list[int], list[float]]  # token ids and their loss weights


def render(doc: Document | Passage, tokenizer: Tokenizer, prompt_weight: float = 0.0) -> Sample:
    """Token ids of the whole document and one loss weight per id, as a target.

    All of a running text weighs 1. In a conversation weight 1 is on what the assistant has to
    produce: reasoning, ``</think>``, content, tool calls and EOS, not the ``<think>`` or
    ``</think>`` with which the prompt ends. All other tokens weigh ``prompt_weight``, and BOS,
    which nothing predicts, 0. In thinking mode without tools only the last turn counts: the ones
    before are shown without their reasoning, as no model wrote them.
    """
    if isinstance(doc, Passage):
        return _render_text(doc, tokenizer)
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


def _render_text(doc: Passage, tokenizer: Tokenizer) -> Sample:
    """BOS, text, EOS; with holes prefix, suffix, middle, as in DeepSeek-V3's training."""
    inner = tokenizer.encode(doc.text)
    if doc.holes:
        first, second = doc.holes
        parts = (doc.text[:first], doc.text[second:], doc.text[first:second])
        marks = (tokenizer.special_id(mark) for mark in (FIM_BEGIN, FIM_HOLE, FIM_END))
        inner = [i for mark, part in zip(marks, parts, strict=True)
                 for i in (mark, *tokenizer.encode(part))]  # fmt: skip
    ids = [tokenizer.bos_id, *inner, tokenizer.eos_id]
    return ids, [0.0] + [1.0] * (len(ids) - 1)


def cut(sample: Sample, length: int) -> list[Sample]:
    """A text as samples of at most ``length`` tokens, each from BOS on; nothing of it is lost."""
    ids, weights = sample
    step = length - 1
    return [
        ([ids[0], *ids[i : i + step]], [0.0, *weights[i : i + step]])
        for i in range(1, len(ids), step)
    ]


Schedule = Callable[[int], int]  # a number that may differ from batch to batch


def ramp(start: int, end: int, batches: int) -> Schedule:
    """A schedule that grows with the batch number from ``start`` to ``end`` in ``batches``.

    It grows by a constant factor per batch and stays at ``end`` afterwards.
    """

    def at(batch: int) -> int:
        done = min(1.0, batch / max(1, batches))
        return round(start * math.exp(done * math.log(end / start)))

    return at


POOL = 16  # batches whose samples are drawn and packed together


class Batch(NamedTuple):
    """Samples one after another in one row: ids ``[1, N]`` int64, weights ``[1, N]`` float32.

    ``lengths`` are the samples' lengths in tokens, in order; their sum is N. ``weights`` are loss
    weights of ids as targets; the first of a sample is 0, as nothing predicts it. What the samples
    leave empty is one last sample of PAD at weight 0.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    lengths: tuple[int, ...]


def batches(
    tokenizer: Tokenizer,
    seed: int,
    tokens_per_batch: int | Schedule = 4096,
    max_length: int | Schedule = 2048,
    start_batch: int = 0,
    *,
    weights: Mapping[str, float] | None = None,
    prompt_weight: float = 0.0,
) -> Iterator[Batch]:
    """Endless packed batches of the train split, each of exactly ``tokens_per_batch`` tokens.

    A sample is one document from BOS to EOS. ``max_length`` (tokens) bounds the recall documents,
    the only long conversations (others may have some 700), and is where a running text is cut
    into samples. A conversation longer than the shortest batch of its pool is left out.

    Both numbers may depend on the batch number (see ``ramp``); the least ``max_length`` of each
    ``POOL`` batches is that of all of them. Batch k depends on the arguments and k alone, so
    training resumes with ``start_batch``, at the cost of making one pool.

    Raises TrainingError when ``max_length`` is below 64 or more than a batch holds, and when
    nearly no conversation fits.
    """
    pad = tokenizer.special_id(PAD)
    size, longest = (x if callable(x) else _always(x) for x in (tokens_per_batch, max_length))
    for number in count(start_batch // POOL):
        numbers = range(number * POOL, (number + 1) * POOL)
        sizes, limits = [size(k) for k in numbers], [longest(k) for k in numbers]
        for k, tokens, limit in zip(numbers, sizes, limits, strict=True):
            if not 64 <= limit <= tokens:
                raise TrainingError(
                    f"batch {k}: max_length does not suit tokens_per_batch",
                    expected=f"64 to {tokens}",
                    got=limit,
                    hint="raise tokens_per_batch or lower max_length",
                )
        limit = min(limits)
        made = (
            document(i, seed, "train", weights, max(48, limit - 80))
            for i in count(number << 24)  # more documents than a pool can use
        )
        samples = _samples(made, tokenizer, limit, min(sizes), prompt_weight)
        rows = pack(samples, sizes, rng_for("pool", seed, number))
        for k, row, tokens in zip(numbers, rows, sizes, strict=True):
            if k >= start_batch:
                yield _batch(row, tokens, pad)


def _always(value: int) -> Schedule:
    return lambda _: value


def _samples(
    documents: Iterable[Document | Passage],
    tokenizer: Tokenizer,
    limit: int,
    shortest_batch: int,
    prompt_weight: float,
) -> Iterator[Sample]:
    """The samples that fit: texts are cut, conversations that are too long are left out."""
    left_out = 0
    for doc in documents:
        sample = render(doc, tokenizer, prompt_weight)
        if isinstance(doc, Passage):
            yield from cut(sample, limit)
        elif len(sample[0]) <= (limit if doc.task in _LONG else shortest_batch):
            yield sample
        else:
            left_out += 1
            if left_out == 1000:
                raise TrainingError(
                    "1,000 conversations in a row did not fit",
                    expected=f"some of at most {limit} tokens",
                    got=f"{len(sample[0])} in the last one, {doc.task}",
                    hint="raise max_length and tokens_per_batch",
                )
            continue
        left_out = 0


def pack(samples: Iterable[Sample], sizes: Sequence[int], rng: Random) -> list[list[Sample]]:
    """Rows of at most ``sizes`` tokens: long samples first, each where most room is left.

    So every row gets the same mixture of long and short, and the short ones fill it up. Takes
    samples until they have as many tokens as the rows; what then fits nowhere is dropped. The
    order within a row is random.
    """
    wanted = sum(sizes)
    taken: list[Sample] = []
    for sample in samples:
        taken.append(sample)
        wanted -= len(sample[0])
        if wanted <= 0:
            break
    rows: list[list[Sample]] = [[] for _ in sizes]
    room = list(sizes)
    for sample in sorted(taken, key=lambda s: len(s[0]), reverse=True):
        r = room.index(max(room))
        if len(sample[0]) <= room[r]:
            rows[r].append(sample)
            room[r] -= len(sample[0])
    for row in rows:
        rng.shuffle(row)
    return rows


def _batch(row: list[Sample], size: int, pad: int) -> Batch:
    used = sum(len(ids) for ids, _ in row)
    filler = [([pad] * (size - used), [0.0] * (size - used))] if used < size else []
    samples = [*row, *filler]
    return Batch(
        torch.tensor([[i for ids, _ in samples for i in ids]]),
        torch.tensor([[w for _, loss in samples for w in loss]]),
        tuple(len(ids) for ids, _ in samples),
    )


# ------------------------------------------------------------------ vocabulary and summary

_CORPUS: Mapping[str, float] = {  # many short documents: rare words have to earn their merges
    "arithmetic": 10,
    "word_problem": 8,
    "units": 4,
    "dates": 4,
    "sorting": 4,
    "letters": 4,
    "recall": 12,
    "json_extract": 12,
    "json_nested": 4,
    "json_convert": 4,
    "tool_call": 12,
    "code_output": 10,
    "dictionary": 20,
    "knowledge": 20,
    "dialogue": 40,
    "everyday": 40,
}


def as_text(doc: Document | Passage) -> str:
    """The document as the model sees it, special tokens spelled out."""
    if not isinstance(doc, Passage):
        return encode_messages(
            doc.messages, doc.thinking_mode, reasoning_effort=doc.reasoning_effort
        )
    text, inner = doc.text, doc.text
    if doc.holes:
        first, second = doc.holes
        inner = FIM_BEGIN + text[:first] + FIM_HOLE + text[second:] + FIM_END + text[first:second]
    return BOS + inner + EOS


def corpus_for_tokenizer(
    seed: int, n: int, weights: Mapping[str, float] | None = None
) -> Iterator[str]:
    """Texts of ``n`` documents, from which a vocabulary is trained.

    Cut at the special tokens, so that no merge is spent on their spelling. ``weights`` are as in
    ``document``; by default many short conversations and no running text.
    """
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    for i in range(n):
        doc = document(i, seed, "train", weights or _CORPUS, 250)
        yield from filter(None, special.split(as_text(doc)))


@dataclass
class KindStats:
    """Sums over the drawn documents of one kind.

    ``trained`` counts tokens with a loss weight, ``size`` bytes of UTF-8, ``repeated`` documents
    that were drawn before. Of a text from a package there are also ``held_out`` documents, and
    ``removed`` ones that were copies; a generator's are as many as one likes, and None here.
    """

    documents: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    size: int = 0
    repeated: int = 0
    held_out: int | None = None
    removed: int | None = None

    @property
    def mean_length(self) -> float:
        return self.tokens / max(1, self.documents)

    @property
    def bytes_per_token(self) -> float:
        return self.size / max(1, self.tokens)


def stats(
    seed: int, n: int, tokenizer: Tokenizer, weights: Mapping[str, float] | None = None
) -> dict[str, KindStats]:
    """What the first ``n`` documents of the train split consist of, by kind."""
    out = {kind: KindStats() for kind in (weights or WEIGHTS) if kind != ANY_TEXT}
    drawn: set[str] = set()
    for i in range(n):
        doc = document(i, seed, "train", weights)
        ids, loss = render(doc, tokenizer)
        text = as_text(doc)
        row = out.setdefault(doc.task, KindStats())
        row.documents += 1
        row.tokens += len(ids)
        row.trained += sum(w > 0 for w in loss)
        row.longest = max(row.longest, len(ids))
        row.size += len(text.encode())
        row.repeated += text in drawn
        drawn.add(text)
    for kind in SOURCES.keys() & out.keys():
        made = corpus(kind)
        out[kind].held_out = len(made.heldout)
        out[kind].removed = made.copies + made.leaks
    return out

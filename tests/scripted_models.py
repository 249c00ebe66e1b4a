"""Models for tests: a tiny real one, and one that says what a test wants to hear."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.api import Model
from dsv4.config import V4Config
from dsv4.encoding import ASSISTANT, SPECIAL_TOKENS, TASKS
from dsv4.engine.session import Part
from dsv4.model import Transformer
from dsv4.numerics import FLOAT32
from dsv4.protocols import Continued
from dsv4.tokenizer import Tokenizer
from dsv4.train.initial import init_weights


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """For modules that import it: small matrices gain nothing from threads that fight for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_tokenizer() -> Tokenizer:
    texts = ["What is the weather in Paris for 3 days? get_weather city string true false name"] * 3
    return Tokenizer.train(texts, len(SPECIAL_TOKENS) + 256 + 60, progress=False)


def tiny_model(tokenizer: Tokenizer) -> Model:
    """A real three-layer V4 with random weights."""
    config = replace(
        V4Config.preset("nano"),
        vocab_size=tokenizer.vocab_size,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 128, 0),
        max_position_embeddings=2048,
    )
    net = Transformer(config)
    init_weights(net, seed=1, std=0.03)
    return Model(net, FLOAT32, "v4-tiny", tokenizer)


class TokenRunner:
    """Runs timelines that are nothing but their tokens; ``logits`` says what follows them.

    It keeps to the promises of the real one: what was computed before is only known through the
    blocks and the cut with which a timeline goes on.
    """

    block_bytes, overhead_bytes = 1024, 512
    guesses: Callable[[list[int]], torch.Tensor] | None = None  # logits, like those of an MTP block

    def __init__(self, logits: Callable[[list[int]], torch.Tensor]) -> None:
        self.logits = logits
        self.before_pass: Callable[[Sequence[Part]], None] = lambda parts: None

    def resume(self, blocks: Sequence[TokenBlock], cut: TokenCut | None) -> TokenTimeline:
        timeline = TokenTimeline()
        if cut is not None:
            whole = [t for block in blocks[: cut.position // 128] for t in block.tokens]
            timeline.tokens = [*whole, *cut.rest]
            assert timeline.length == cut.position
        return timeline

    def run(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        for part in parts:
            timeline: Any = part.state
            timeline.tokens = [*timeline.tokens, *part.ids]  # even if the pass fails
            if part.trail is not None:
                trail: Any = part.trail
                trail.tokens, trail.unseen = timeline.tokens, trail.unseen + len(part.ids)
        self.before_pass(parts)
        out = []
        for part in parts:
            tokens, wanted = part.state.tokens, part.wanted or 0  # type: ignore[attr-defined]
            ends = range(len(tokens) - wanted + 1, len(tokens) + 1)
            rows = [self.logits(tokens[:end]) for end in ends]
            out.append(torch.stack(rows) if rows else torch.empty(0))
        return out

    def trail(self) -> TokenTrail | None:
        return None if self.guesses is None else TokenTrail()

    def guess(
        self, timelines: Sequence[Continued], trails: Sequence[TokenTrail]
    ) -> torch.Tensor:
        assert self.guesses is not None
        rows = []
        for timeline, trail in zip(timelines, trails, strict=True):
            before = trail.tokens[: timeline.start + 1]
            assert len(trail.tokens) == timeline.start + trail.unseen == timeline.start + len(
                timeline.ids
            )
            assert trail.tokens == [*before, *timeline.ids[:-1]]
            trail.unseen = 0
            rows.append(self.guesses([*trail.tokens, timeline.ids[-1]]))
        return torch.stack(rows)


@dataclass
class TokenTrail:
    """Tokens whose streams a guess may use, and how many of the last it has not seen."""

    tokens: list[int] = field(default_factory=list)
    unseen: int = 0

    def take_back(self, tokens: int) -> None:
        self.tokens = self.tokens[: len(self.tokens) - tokens]
        self.unseen -= tokens


@dataclass
class TokenBlock:
    tokens: list[int]

    def checksum(self) -> int:
        return hash(tuple(self.tokens))


@dataclass(eq=False)
class TokenCut:
    position: int
    rest: list[int]
    bytes: int = 4096


@dataclass
class TokenTimeline:
    tokens: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def blocks(self) -> list[TokenBlock]:
        return [TokenBlock(self.tokens[i : i + 128]) for i in range(0, self.length, 128)]

    def cut(self, position: int) -> TokenCut:
        return TokenCut(position, self.tokens[position // 128 * 128 : position])

    def take_back(self, tokens: int) -> None:
        self.tokens = self.tokens[: len(self.tokens) - tokens]

    def settle(self) -> None:
        pass


class ScriptedModel:
    """Says ``script`` after any prompt, or what ``script`` makes of the prompt's text.

    The engine, the decoder and the parser around it are real. ``pause`` is seconds per step.
    """

    name = "v4-scripted"
    folder: Path | None = None
    numerics = "none"
    experts = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.config = replace(V4Config.preset("nano"), vocab_size=tokenizer.vocab_size)
        self.script: str | Callable[[str], str] = ""
        self.pause = 0.0

    def runner(self) -> TokenRunner:
        return TokenRunner(self._logits)

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        time.sleep(self.pause)
        logits = torch.zeros(self.tokenizer.vocab_size)
        start, script = self.tokenizer.special_id(ASSISTANT), self.script
        if start in tokens:
            latest = tokens[::-1]
            said = latest.index(start) - 1  # after <think> or </think>
            title = self.tokenizer.special_id(TASKS["title"])
            if title in latest[:said]:
                said = latest.index(title)
            if callable(script):
                script = script(self.tokenizer.decode(tokens[: len(tokens) - said]))
            answer = [*self.tokenizer.encode(script, allow_special=True), self.tokenizer.eos_id]
            logits[answer[said] if 0 <= said < len(answer) else self.tokenizer.eos_id] = 30
        return logits

"""Models for tests: a tiny real one, and one that says what a test wants to hear."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4.api import Model
from dsv4.config import V4Config
from dsv4.encoding import ASSISTANT, SPECIAL_TOKENS
from dsv4.model import FLOAT32, Transformer
from dsv4.tokenizer import Tokenizer


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
    net.init_weights(seed=1, std=0.03)
    return Model(net, FLOAT32, "v4-tiny", tokenizer)


class ScriptedModel:
    """Says ``script`` after any prompt, or what ``script`` makes of the prompt's text.

    The engine, the decoder and the parser around it are real. ``pause`` is seconds per step.
    """

    name = "v4-scripted"
    numerics = "none"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.config = replace(V4Config.preset("nano"), vocab_size=tokenizer.vocab_size)
        self.script: str | Callable[[str], str] = ""
        self.pause = 0.0

    def session(self) -> Any:
        return ScriptedSession(self)


class ScriptedSession:
    def __init__(self, model: ScriptedModel, tokens: list[int] | None = None) -> None:
        self.model, self.tokens = model, tokens or []

    def __len__(self) -> int:
        return len(self.tokens)

    def bytes(self) -> int:
        return 0

    def extend(self, ids: list[int], last: bool = False) -> torch.Tensor:
        self.tokens = self.tokens + ids
        time.sleep(self.model.pause)
        tokenizer, script = self.model.tokenizer, self.model.script
        logits = torch.zeros(1, tokenizer.vocab_size)
        start = tokenizer.special_id(ASSISTANT)
        if start in self.tokens:
            said = self.tokens[::-1].index(start) - 1  # after <think> or </think>
            if callable(script):
                script = script(tokenizer.decode(self.tokens[: len(self.tokens) - said]))
            answer = [*tokenizer.encode(script, allow_special=True), tokenizer.eos_id]
            logits[0, answer[said] if 0 <= said < len(answer) else tokenizer.eos_id] = 30
        return logits

    def rewind(self, keep: int) -> None:
        self.tokens = self.tokens[:keep]

    def fork(self) -> ScriptedSession:
        return ScriptedSession(self.model, list(self.tokens))

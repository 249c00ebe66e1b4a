"""What several test modules ask of: a small tokenizer, and a server of a real, tiny model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import Server
from scripted_models import small_tokenizer, tiny_model

from dsv4.server import LocalBackend
from dsv4.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def tiny(tokenizer: Tokenizer) -> Iterator[Server]:
    with Server(LocalBackend(tiny_model(tokenizer))) as server:
        yield server

"""Tokens in, tokens out: timelines of tokens, sampling, and the engine that runs many at once.

Nothing in this package knows text; prompts and answers become text in ``dsv4.encoding`` and
``dsv4.tokenizer``.
"""

from .engine import (
    Engine,
    EngineBusyError,
    EngineClosedError,
    EngineStats,
    Generation,
    Token,
    Usage,
)
from .sample import Guide, Logprob, SamplingParams, sample

__all__ = [
    "Engine",
    "EngineBusyError",
    "EngineClosedError",
    "EngineStats",
    "Generation",
    "Guide",
    "Logprob",
    "SamplingParams",
    "Token",
    "Usage",
    "sample",
]

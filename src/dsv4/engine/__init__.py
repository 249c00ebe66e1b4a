"""Tokens in, tokens out: timelines of tokens, sampling, and the engine that runs many at once.

Nothing in this package knows text; prompts and answers become text in ``dsv4.encoding`` and
``dsv4.tokenizer``.
"""

from .engine import (
    Engine,
    EngineBusyError,
    EngineClosedError,
    EngineStats,
    EngineStuckError,
    Generation,
    Token,
    Usage,
)
from .prefix import Reuse
from .sample import Guide, Logprob, SamplingParams, sample

__all__ = [
    "Engine",
    "EngineBusyError",
    "EngineClosedError",
    "EngineStats",
    "EngineStuckError",
    "Generation",
    "Guide",
    "Logprob",
    "Reuse",
    "SamplingParams",
    "Token",
    "Usage",
    "sample",
]

"""dsv4: the whole DeepSeek-V4 system in Python.

    import dsv4
    m = dsv4.load("v4-nano")                 # or a folder in the official checkpoint format
    m.logits([0, 5, 9])                      # [3, vocab]
    s = m.session(); s.extend([0, 5, 9]); s.rewind(1)
    m.chat([{"role": "user", "content": "Hello!"}])

Everything public is listed in ``__all__``; it is imported when first used, so ``import dsv4``
itself is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import encoding
    from .api import Model, load
    from .config import V4Config
    from .engine import Engine, SamplingParams
    from .engine.session import Session
    from .errors import (
        CheckpointError,
        ConfigError,
        ContextLengthError,
        DSV4Error,
        EncodingError,
        RequestError,
        TrainingError,
    )

__version__ = "0.1.0"
_HOME = {
    "encoding": "encoding",
    "Model": "api",
    "load": "api",
    "V4Config": "config",
    "Engine": "engine",
    "SamplingParams": "engine",
    "Session": "engine.session",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "ContextLengthError": "errors",
    "DSV4Error": "errors",
    "EncodingError": "errors",
    "RequestError": "errors",
    "TrainingError": "errors",
}
__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DSV4Error",
    "EncodingError",
    "Engine",
    "Model",
    "RequestError",
    "SamplingParams",
    "Session",
    "TrainingError",
    "V4Config",
    "encoding",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsv4' has no attribute {name!r}")
    module = importlib.import_module(f".{_HOME[name]}", __name__)
    value = module if name == _HOME[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

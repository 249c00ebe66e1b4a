"""HTTP in front of a model: requests and events in DeepSeek's formats, never a tensor.

What is listed is imported when first used: commands about keys need no engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app
    from .backend import Backend
    from .local import LocalBackend
    from .process import listen, run

_HOME = {
    "create_app": "app",
    "Backend": "backend",
    "LocalBackend": "local",
    "listen": "process",
    "run": "process",
}
__all__ = ["Backend", "LocalBackend", "create_app", "listen", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsv4.server' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)

"""What a reasoning effort means: a table that belongs to the weights.

The weights of April 2026 know two depths, those of July and August three, and the text that asks
for most in April asks for the middle one later. A checkpoint says which it is by the encoder in its
``encoding`` folder: what that file says is read, never run.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..encoding import MAX_EFFORT

_START = "Reasoning Effort:"  # of every text that asks for an effort
_BEYOND = f"{_START} Beyond maximum"


@dataclass(frozen=True)
class Efforts:
    """``level`` of each asked effort ("off" or a name), and the text before the prompt for each."""

    level: Mapping[str, str]
    text: Mapping[str, str]

    def of(self, asked: str) -> tuple[str, str]:
        """``thinking_mode`` and the text that stands before the first message."""
        level = self.level.get(asked, "high")
        return "chat" if level == "off" else "thinking", self.text.get(level, "")


APRIL = Efforts(
    {"none": "off", "minimal": "high", "low": "high", "xhigh": "max", "max": "max", "ultra": "max"},
    {"max": MAX_EFFORT},
)
_LATER = {"none": "off", "minimal": "low", "low": "low", "max": "max", "ultra": "max"}


def efforts_of(folder: Path | None) -> Efforts:
    """The table of the checkpoint in ``folder``; that of April where nothing says otherwise."""
    for name in ("encoding/encoding_dsv4.py", "encoding_dsv4.py"):
        if folder is not None and (folder / name).is_file():
            try:
                tree = ast.parse((folder / name).read_text(encoding="utf-8"))
            except (OSError, SyntaxError, ValueError):
                continue
            texts = [
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value.startswith(_START)
            ]
            beyond = [text for text in texts if text.startswith(_BEYOND)]
            other = [text for text in texts if not text.startswith(_BEYOND)]
            if beyond and other:
                return Efforts(_LATER, {"high": other[0], "max": beyond[0]})
    return APRIL

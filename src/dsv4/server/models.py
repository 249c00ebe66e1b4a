"""Which model answers to which name, and what else all surfaces share.

V4's two names, ``deepseek-v4-flash`` and ``deepseek-v4-pro``, stand for whatever checkpoints are
served under them; the answer always says which model it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .backend import Backend, ModelInfo
from .wire import KEEP_ALIVE, ApiError

FLASH, PRO = "deepseek-v4-flash", "deepseek-v4-pro"
# Refused by the hosted API since 2026-07-24 15:59 UTC; the value is whether the name thinks.
RETIRED: Mapping[str, bool] = {"deepseek-chat": False, "deepseek-reasoner": True}


@dataclass(frozen=True)
class Route:
    """The backend for one name; ``thinks`` is what the name itself says about thinking."""

    backend: Backend
    thinks: bool | None = None


class Models:
    """The served models: ``flash`` answers to every name that is not another's.

    ``strict``         refuse unknown names with 400, as the hosted API does
    ``retired_names``  take deepseek-chat and deepseek-reasoner for flash without and with thinking
    """

    def __init__(
        self,
        flash: Backend,
        pro: Backend | None = None,
        *,
        strict: bool = False,
        retired_names: bool = False,
    ) -> None:
        self.flash, self.pro = flash, pro or flash
        self._strict, self._retired_names = strict, retired_names
        self._own = {b.model.id: b for b in (self.pro, flash)}

    def route(self, name: str) -> Route:
        """Raises ApiError 400 for a name that is retired, or unknown to a strict server."""
        asked = name.strip().removesuffix("[1m]")  # Claude Code's mark for a long context
        if asked in self._own:
            return Route(self._own[asked])
        if asked in (FLASH, PRO):
            return Route(self.pro if asked == PRO else self.flash)
        if asked in RETIRED:
            if not self._retired_names:
                raise self._unknown(name)
            return Route(self.flash, RETIRED[asked])
        if asked.startswith("claude-"):
            return Route(self.pro if asked.startswith("claude-opus") else self.flash)
        if self._strict and asked:
            raise self._unknown(name)
        return Route(self.flash)

    def _unknown(self, name: str) -> ApiError:
        return ApiError(
            f"The supported API model names are {PRO} or {FLASH}, but you passed {name}."
        )

    def cards(self) -> list[dict[str, Any]]:
        """For /models: the models themselves, and V4's names with what stands behind them."""
        cards = {i: _card(i, b.model) for i, b in reversed(self._own.items())}
        for name, backend in ((FLASH, self.flash), (PRO, self.pro)):
            cards.setdefault(name, _card(name, backend.model))
        return list(cards.values())


def _card(name: str, model: ModelInfo) -> dict[str, Any]:
    about = model.description
    if name != model.id:
        about = f"Another name for {model.id}, which answers. {about}"
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "created": model.created,
        "owned_by": "dsv4",
        "root": model.id,
        "display_name": model.id if name == model.id else f"{name} ({model.id})",
        "description": about,
        "context_length": model.context_length,
        "max_output_tokens": model.max_output_tokens,
    }


@dataclass(frozen=True)
class Service:
    """What a surface needs: the models, and the settings of ``create_app``."""

    models: Models
    official_sampling: bool = False
    keep_alive: float = KEEP_ALIVE

"""What the surfaces have in common: fields of a request, how their values are read, and how an
answer is sent. A surface knows this module and no other surface."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import Field
from starlette.responses import Response

from ..engine import SamplingParams
from .backend import ModelInfo
from .models import Route, Service
from .wire import ApiError, Closing, Envelope, LiveResponse, Loose, dumps

BASES = ("/v1", "", "/beta", "/beta/v1")  # what the base URLs of OpenAI's clients end with
MAX_STOPS = 16
MAX_EFFORT_CONTEXT = 393216  # tokens of context that reasoning at effort max is meant to have
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]
Choice = Literal["none", "auto", "required"]
Item = TypeVar("Item")


class Asked(Loose):
    """Fields that the request for an answer has on every surface."""

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None

    def sampled(
        self,
        max_tokens: int | None,
        seed: int | None = None,
        logprobs: int | None = None,
        *,
        ignored: bool = False,
    ) -> SamplingParams:
        """Sampling parameters, checked. With ``ignored`` temperature and top_p have no effect."""
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed,
            logprobs=logprobs,
        )
        return replace(params, temperature=1.0, top_p=1.0) if ignored else params


class AskedChat(Asked):
    """The same of an answer that may think."""

    max_thinking_tokens: int | None = None

    @property
    def budget(self) -> int | None:
        tokens = self.max_thinking_tokens
        if tokens is not None and tokens < 0:
            raise ApiError(
                "Invalid max_thinking_tokens value, the valid range of max_thinking_tokens is "
                "[0, inf)"
            )
        return tokens


class Thinking(Loose):
    type: Literal["enabled", "disabled", "adaptive"] = "enabled"

    @property
    def on(self) -> bool:
        return self.type != "disabled"


class Schema(Loose):
    """An object that holds a JSON schema, and what it is called."""

    # not called ``schema``: pydantic has a method of that name
    wanted: dict[str, Any] | None = Field(default=None, alias="schema")


def schema(kind: str, held: Schema | None, where: str) -> dict[str, Any] | None:
    """The schema that a format of this ``kind`` asks for; None for one that asks for none."""
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        return None
    if held is None or held.wanted is None:
        raise ApiError(f"Invalid {where}: json_schema needs a schema")
    return held.wanted


def effort(switch: bool | None, asked: str | None, route: Route) -> str:
    """The effort to answer with, "none" for no thinking. A switch wins over an effort, and both
    over what the model's name says."""
    if switch is None and asked is None:
        switch = route.thinks
    if switch is False or (asked == "none" and switch is None):
        return "none"
    return "high" if asked in (None, "none") else str(asked)


def stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    found = [stop] if isinstance(stop, str) else list(stop or ())
    if len(found) > MAX_STOPS:
        raise ApiError(f"Stop string array too long: {len(found)}")
    return tuple(s for s in found if s)


def namespace(user: object) -> str:
    """Any user id as a short name; clients send names, numbers, even JSON."""
    return hashlib.sha256(str(user).encode()).hexdigest()[:16] if user else ""


def note(model: ModelInfo, asked: str) -> dict[str, str]:
    """What the caller should know about an answer at this effort, as a field of it."""
    if asked not in ("xhigh", "max", "ultra") or model.context_length >= MAX_EFFORT_CONTEXT:
        return {}
    return {
        "note": f"reasoning effort max is meant for a context of {MAX_EFFORT_CONTEXT} tokens; "
        f"{model.id} has {model.context_length} here"
    }


def live(
    service: Service,
    chunks: AsyncGenerator[str, None],
    events: Closing[Item],
    *,
    stream: bool | None,
    idle: str | Callable[[], str],
    failure: Callable[[ApiError], str],
    envelope: Envelope = ApiError.body,
    said: dict[str, str] | None = None,
) -> Response:
    """``chunks``, which are made of ``events``, sent as they come; the work behind them ends with
    the response.

    In a ``stream`` the surface says what fills silence (``idle``) and how a late ``failure`` is
    told; before a whole body silence is filled with empty lines. ``said`` is the answer's
    ``note``, which stands in a header, too.
    """
    return LiveResponse(
        Closing(chunks, events.aclose),
        media_type="text/event-stream" if stream else "application/json",
        idle=idle if stream else "\n",
        failure=failure if stream else lambda error: dumps(envelope(error)),
        interval=service.keep_alive,
        envelope=envelope,
        headers={f"x-dsv4-{name}": text for name, text in (said or {}).items()},
    )

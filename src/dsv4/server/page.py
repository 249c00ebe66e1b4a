"""The web chat at ``/``: its files, what it asks the server about, and what it may do.

The page is plain files under ``web/``; ``web/vendor`` holds other people's, as npm has them
(``manifest.json`` says which, with checksums). The security policy lets it load its own files,
talk to its own server, and nothing else: whatever a model writes, nothing runs and nothing leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from ..engine import SamplingParams
from .backend import Backend, ChatRequest, ContentDelta
from .conversations import ConversationBody, Conversations, Owner, conversation_routes
from .models import FLASH, PRO, Models
from .prices import PICO, PriceList
from .wire import ApiError, read_json

FILES = Path(__file__).parent / "web"
HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "font-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types dompurify",
        )
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-DNS-Prefetch-Control": "off",
    "X-Frame-Options": "DENY",
}
CHOICES = (("Instant", FLASH), ("Expert", PRO))
TITLE_TOKENS, TITLE_LENGTH = 32, 80
EXAMPLES = {
    "v4-nano": (
        "What is 47 + 38?",
        "Hello! What can you do?",
        "What is the capital of France?",
    )
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_page(
    app: FastAPI,
    models: Models,
    conversations: Conversations,
    owner: Owner,
    *,
    keys: Callable[[], bool],
    prices: PriceList | None = None,
) -> None:
    """Give ``app`` the page and its routes. ``owner`` says who asks, and refuses strangers.

    ``keys`` tells the page whether a key is asked for; ``prices`` are what answers cost (default:
    the package's list).
    """
    prices = prices or PriceList()

    @app.head("/", include_in_schema=False)  # with which Claude Code looks whether anyone is here
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(FILES / "index.html", headers=HEADERS)

    @app.get("/web/about", include_in_schema=False)
    async def about() -> dict[str, Any]:
        return {
            "version": version("dsv4"),
            "keys": keys(),
            "titles": models.flash.model.knows_titles,
            "prices": _prices(prices),
            "choices": [
                {"name": name, "model": model, "answers": _answers(models.route(model).backend)}
                for name, model in CHOICES
            ],
            "examples": EXAMPLES.get(models.flash.model.id, ()),
        }

    private = APIRouter(dependencies=[Depends(_same_site)], include_in_schema=False)

    @private.post("/web/tokens")
    async def tokens(request: Request) -> dict[str, int]:
        owner(request)
        text = (await read_json(request)).get("text")
        if not isinstance(text, str):
            raise ApiError("text: a string is expected")
        whole, nothing = (
            ChatRequest([{"role": "user", "content": content}], effort="none")
            for content in (text, "")
        )
        count = models.flash.count_tokens
        return {"tokens": await count(whole) - await count(nothing)}

    @private.post("/web/conversations/{id}/title")
    async def title(request: Request, id: str) -> dict[str, str]:
        who = owner(request)
        whole = await conversations.one(who, id)
        if not models.flash.model.knows_titles:
            return {"title": whole["title"]}
        made = await _title(models.flash, whole["messages"])
        if made:
            await conversations.put(who, id, ConversationBody(title=made))
        return {"title": made or whole["title"]}

    private.include_router(conversation_routes(conversations, owner))
    app.include_router(private)
    app.mount("/web", _Files(directory=FILES), name="web")


def _prices(prices: PriceList) -> dict[str, dict[str, float]]:
    """Dollars per million tokens, for the names the page asks for."""
    today = datetime.now(timezone.utc)
    listed = {model: prices.at(model, today) for _, model in CHOICES}
    return {
        model: {kind: getattr(p, kind) * 1e6 / PICO for kind in ("hit", "miss", "output")}
        for model, p in listed.items()
    }


def _answers(backend: Backend) -> dict[str, Any]:
    model = backend.model
    return {
        "id": model.id,
        "description": model.description,
        "context_length": model.context_length,
        "small": model.small,
    }


async def _title(backend: Backend, messages: list[dict[str, Any]]) -> str:
    """What the model's ``title`` task calls the beginning of a conversation; "" if nothing."""
    beginning = [
        {"role": role, "content": next((m["content"] for m in messages if m["role"] == role), "")}
        for role in ("user", "assistant")
    ]
    beginning[-1]["task"] = "title"
    sampling = SamplingParams(max_tokens=TITLE_TOKENS, temperature=0)
    events = await backend.chat(ChatRequest(beginning, effort="none", sampling=sampling))
    async with aclosing(events):
        text = "".join([e.text async for e in events if isinstance(e, ContentDelta)])
    return " ".join(text.split()).strip("\"'“”*# ")[:TITLE_LENGTH]


def _same_site(request: Request) -> None:
    """Other sites that the browser has open get nothing, whatever they have it send."""
    if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise ApiError("This page's data is for this page alone.", 403, "permission_error")

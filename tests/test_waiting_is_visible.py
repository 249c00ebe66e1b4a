"""Who waits sees how far it is and, in the end, why it took so long; nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random
from typing import Any

import anthropic
import httpx
import openai
import pytest
from live_server import OFF, Server, wait_for
from prometheus_client.parser import text_string_to_metric_families
from scripted_models import ScriptedModel, TokenRunner, small_tokenizer

from dsv4.engine import Engine, EngineStuckError, SamplingParams
from dsv4.engine.session import Part
from dsv4.engine.watchdog import Watchdog
from dsv4.server.local import LocalBackend
from dsv4.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


class Slow:
    """A scripted model whose passes take ``pause`` seconds, and wait while ``gate`` is closed."""

    def __init__(self, tokenizer: Tokenizer, script: str, pause: float = 0.0) -> None:
        self._model, self._pause, self.gate = ScriptedModel(tokenizer), pause, threading.Event()
        self._model.script = script
        self.gate.set()
        self.config, self.tokenizer = self._model.config, tokenizer
        self.name, self.folder, self.numerics, self.experts = "v4-slow", None, "none", None

    def runner(self) -> TokenRunner:
        runner = self._model.runner()

        def wait(parts: Sequence[Part]) -> None:
            time.sleep(self._pause)
            self.gate.wait(30)

        runner.before_pass = wait
        return runner


def long_prompt(seed: int) -> list[dict[str, Any]]:
    random = Random(seed)
    return [{"role": "user", "content": " ".join(random.choices("abcdefgh", k=500))}]


# ---------------------------------------------------------------- progress and reasons


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    backend = LocalBackend(Slow(tokenizer, "Read.", 0.03), step_tokens=64)  # type: ignore
    with Server(backend, keep_alive=0.05) as server:
        yield server


def test_a_stream_says_how_much_of_the_prompt_is_read(server: Server) -> None:
    body = {"messages": long_prompt(1), "stream": True, **OFF}
    lines = server.post(body).text.split("\n")
    said = [line for line in lines if line.startswith(": keep-alive, prefill ")]
    steps = [tuple(map(int, line.split()[3].split("/"))) for line in said]
    usage = server.chunks(body)[-1]["usage"]
    assert len(steps) >= 3 and steps == sorted(steps)
    assert {total for _, total in steps} == {usage["prompt_tokens"]}
    assert 0 < steps[-1][0] <= usage["prompt_tokens"]
    assert not any(a.startswith(":") and not b for a, b in pairwise(lines))


def test_openai_clients_read_past_it(server: Server) -> None:
    chunks = list(server.client.chat.completions.create(
        model="m", messages=long_prompt(2), stream=True, extra_body=OFF,  # type: ignore
    ))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Read."
    events = list(server.client.responses.create(
        model="m", input=long_prompt(3), stream=True, reasoning={"effort": "none"},  # type: ignore
    ))  # fmt: skip
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "Read."


def details(usage: Any) -> dict[str, int]:
    found: dict[str, int] = usage.model_extra["prompt_cache_details"]
    return found


def test_every_api_says_where_the_prompt_came_from(server: Server) -> None:
    messages: Any = long_prompt(4)
    ask = server.client.chat.completions.create
    first = ask(model="m", messages=messages, extra_body=OFF).usage
    again = ask(model="m", messages=messages, extra_body=OFF).usage
    assert first and again and first.prompt_tokens_details and again.prompt_tokens_details
    for usage in (first, again):
        assert sum(details(usage).values()) == usage.prompt_tokens
        cached = usage.prompt_tokens_details
        assert cached and details(usage)["memory"] == cached.cached_tokens
    assert details(first)["new"] > 400 and details(again)["new"] == 1
    *_, last = ask(model="m", messages=messages, stream=True, extra_body=OFF)
    assert last.usage and details(last.usage) == details(again)
    response = server.client.responses.create(
        model="m", input=messages, reasoning={"effort": "none"}
    )
    assert response.usage and details(response.usage) == details(again)
    client = anthropic.Anthropic(base_url=f"{server.url}/anthropic", api_key="none", max_retries=0)
    message = client.messages.create(
        model="m", max_tokens=50, messages=messages, thinking={"type": "disabled"}
    )
    extra = message.usage.model_extra or {}
    assert extra["prompt_cache_details"] == details(again)
    assert message.usage.cache_read_input_tokens == details(again)["memory"]
    with client.messages.stream(
        model="m", max_tokens=50, messages=messages, thinking={"type": "disabled"}
    ) as stream:
        assert stream.get_final_text() == "Read."
        begun = stream.current_message_snapshot.usage
        assert begun.cache_read_input_tokens == details(again)["memory"]
    client.close()
    counted = {
        sample.labels["whence"]: sample.value
        for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
        for sample in family.samples if sample.name == "dsv4_prompt_tokens_total"
    }  # fmt: skip
    assert counted["new"] >= details(first)["new"] and counted["memory"] > 0
    assert set(counted) == set(details(first))


# ---------------------------------------------------------------- a step that does not return


def test_a_stuck_step_is_reported_and_fails_its_requests(tokenizer: Tokenizer) -> None:
    model = Slow(tokenizer, "Well.")
    backend = LocalBackend(model, stuck_after=0.3)  # type: ignore[arg-type]
    with Server(backend) as server:
        body = {"messages": [{"role": "user", "content": "Hello"}], **OFF}
        wanted = server.post(body).json()["choices"][0]["message"]
        assert httpx.get(f"{server.url}/ready").status_code == 200
        model.gate.clear()
        try:
            failed = server.post(body)
            assert failed.status_code == 503
            assert "stuck" in failed.json()["error"]["message"]
            assert httpx.get(f"{server.url}/ready").status_code == 503
            assert "dsv4_stuck{" in httpx.get(f"{server.url}/metrics").text
            start = time.monotonic()
            assert server.post(body).status_code == 503  # at once
            assert time.monotonic() - start < 0.3
            with pytest.raises(openai.InternalServerError, match="stuck"):
                server.client.chat.completions.create(model="m", messages=body["messages"])
        finally:
            model.gate.set()
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
        assert server.post(body).json()["choices"][0]["message"] == wanted
        wait_for(lambda: backend.engine.stats().running == 0)


def test_an_engine_that_is_stuck_can_be_closed(tokenizer: Tokenizer) -> None:
    model = Slow(tokenizer, "Well.")
    model.gate.clear()
    engine = Engine(model, stuck_after=0.1)
    generation, waiting = engine.submit([1, 2, 3]), engine.submit([4] * 300)
    for one in (generation, waiting):
        with pytest.raises(EngineStuckError, match="does not return"):
            one.result()
    with pytest.raises(EngineStuckError):
        engine.submit([1], SamplingParams())
    engine.close()
    model.gate.set()


def test_slow_steps_that_grow_slower_are_no_alarm() -> None:
    alarms: list[float] = []
    dog = Watchdog(0.2, alarms.append)
    for seconds in (0.01, 0.05, 0.3, 0.0, 0.4):  # with a patience of 0.2
        with dog.step():
            time.sleep(seconds)
        assert not dog.late
    assert not alarms
    with dog.step():
        wait_for(lambda: dog.late, 30)
        wait_for(lambda: bool(alarms))
    assert not dog.late and len(alarms) == 1 and alarms[0] > 0.2 + 10 * 0.4 * 0.9
    dog.close()

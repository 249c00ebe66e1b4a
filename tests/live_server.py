"""A real server on a real socket, and the requests that tests send to it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import uvicorn

from dsv4.encoding import DSML
from dsv4.server import Backend, create_app, listen

HELLO = [{"role": "user", "content": "Hello"}]
OFF = {"thinking": {"type": "disabled"}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n'
    f'<{DSML}parameter name="city" string="true">Paris</{DSML}parameter>\n'
    f'<{DSML}parameter name="days" string="false">3</{DSML}parameter>\n'
    f"</{DSML}invoke>\n</{DSML}tool_calls>"
)


class Server:
    def __init__(self, backend: Backend, **options: Any) -> None:
        self.backend = backend
        self._socket = listen("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app = create_app(backend, **options)
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._uvicorn.run, args=([self._socket],))
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def __enter__(self) -> Server:
        self._thread.start()
        wait_for(lambda: self._uvicorn.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._uvicorn.should_exit = True
        self.backend.close()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def post(self, body: Any, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self.url + path, content=data, timeout=30, **more)

    def chunks(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The decoded events of a stream, whose last line must be [DONE]."""
        response = self.post({**body, "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        # between them may stand comments that keep the connection alive
        lines = [x for x in response.text.split("\n") if x.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)

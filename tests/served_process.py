"""A real server in a process of its own, which a test may kill; starting another one is cheap."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import httpx

# The modules are imported once; each server is a fork of the process that has them.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["scripted_models", "dsv4.server.app", "dsv4.server.process"])


def serve(sock: socket.socket, database: str, script: str, pause: float, running: int) -> None:
    """The whole server, with a model that says ``script``, one token in ``pause`` seconds."""
    from scripted_models import ScriptedModel, small_tokenizer

    from dsv4.server import LocalBackend, create_app, run
    from dsv4.server.database import Database

    model = ScriptedModel(small_tokenizer())
    model.script, model.pause = script, pause
    backend = LocalBackend(model, max_running=running, max_waiting=40)
    run(create_app(backend, database=Database(database), keep_alive=0.2), [backend], sock)


@contextmanager
def serving(
    database: str, script: str, *, pause: float = 0.001, running: int = 8
) -> Iterator[tuple[BaseProcess, str]]:
    """The process and its address; it is killed at the end, if it still runs."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as sock:
        process = PROCESSES.Process(target=serve, args=(sock, database, script, pause, running))
        process.start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        # the kernel keeps what is sent before the server listens
        assert httpx.get(f"{url}/ready", timeout=120).status_code == 200
        yield process, url
    finally:
        kill(process)


def kill(process: BaseProcess) -> None:
    """End it as a power cut would."""
    if process.is_alive() and process.pid:
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)

"""Running the application on a port, and ending it cleanly."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import ConfigError
from .backend import Backend

GRACE = 3  # seconds for open answers to be finished after the backend has stopped


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises ConfigError when that cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(128)  # refuses a second server now and not when the model is loaded
        except BaseException:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}",
            expected="a free port of this machine",
            got=error,
            hint=f"another port: dsv4 serve --port {port + 1 if 0 < port < 65535 else 8001}",
        ) from error
    return sock


def run(
    app: FastAPI, backends: Sequence[Backend], sock: socket.socket, log_level: str = "warning"
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is open and return.

    The signal stops the backends, so answers in progress end at once with the finish reason
    "insufficient_system_resource". Call it in the main thread.
    """
    config = uvicorn.Config(
        app, log_level=log_level, timeout_graceful_shutdown=GRACE, access_log=False, lifespan="off"
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            # in a thread, because it waits for the step that is being computed
            threading.Thread(target=close, daemon=True).start()

    def close() -> None:
        for backend in backends:
            backend.close()

    # uvicorn raises the signal again when it is done; by then it has been obeyed
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {sig: signal.signal(sig, lambda *_: None) for sig in signals}
    try:
        Server(config).run(sockets=[sock])
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
        close()

"""Running the application on a port, and ending it cleanly."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ConfigError
from . import logs
from .app import Operations
from .backend import Backend
from .ledger import SIGN_OF_LIFE

DRAIN = 30.0  # seconds for open answers to end by themselves
HEAD_PAUSE = 15.0  # seconds from connecting, or a request's first byte, to the end of its head
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


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that gives a client HEAD_PAUSE seconds to say what it wants, and no more."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        idle = self.conn.their_state is h11.IDLE  # the head of the next request is not complete
        if idle and not self.transport.is_closing():
            self._wait()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().call_later(HEAD_PAUSE, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        self.transport.close()


def check_tls(cert: str | None, key: str | None) -> None:
    """Raises ConfigError unless the files are a certificate (chain) and its private key."""
    if cert is None and key is None:
        return
    try:
        if cert is None:
            raise ValueError("a key without a certificate")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        raise ConfigError(
            "these files do not make a TLS server",
            expected="a certificate chain and its private key without a password, in PEM",
            got=error,
            hint="--tls-cert FILE --tls-key FILE",
        ) from error


def run(
    app: FastAPI,
    backends: Sequence[Backend],
    sock: socket.socket,
    *,
    drain: float = DRAIN,
    tls: tuple[str, str | None] | None = None,
    proxies: Sequence[str] = (),
    log: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is open and return.

    SIGTERM drains first: /ready says 503, new requests are refused, and open answers have
    ``drain`` seconds to end. What is open after that, or at SIGINT or a second SIGTERM, ends at
    once with the finish reason "insufficient_system_resource". Call it in the main thread.

    ``tls`` is a certificate file and its key's, ``proxies`` the addresses whose X-Forwarded-For
    and X-Forwarded-Proto are believed, ``log`` whether each request is logged.
    """
    operations: Operations = app.state.operations
    gate, ledger = operations.gate, operations.ledger
    logs.configure(log)
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=GRACE,
        ssl_certfile=tls[0] if tls else None,
        ssl_keyfile=tls[1] if tls else None,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            first, gate.draining = not gate.draining, True
            if sig == signal.SIGTERM and first:
                logs.event("draining", open=gate.open, seconds=drain)
                threading.Thread(target=self._drain, daemon=True).start()
            else:
                self._end()
                if sig == signal.SIGINT and not first:
                    self.force_exit = True

        def _drain(self) -> None:
            end = time.monotonic() + drain
            while gate.open and time.monotonic() < end and not self.should_exit:
                time.sleep(0.05)
            self._end()

        def _end(self) -> None:
            self.should_exit = True
            # in a thread, because it waits for the step that is being computed
            threading.Thread(target=close, daemon=True).start()

    def close() -> None:
        for backend in backends:
            backend.close()

    ended = threading.Event()

    def live() -> None:
        while not ended.wait(SIGN_OF_LIFE):
            try:
                ledger.beat()
            except Exception as error:  # it may go better next time
                logs.event("no sign of life", logging.ERROR, exc_info=error)

    life = threading.Thread(target=live, daemon=True)
    life.start()
    # uvicorn raises the signal again when it is done; by then it has been obeyed
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {sig: signal.signal(sig, lambda *_: None) for sig in signals}
    try:
        Server(config).run(sockets=[sock])
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
        close()
        ended.set()
        life.join()
        ledger.end()

"""Runs the application on a socket until it is told to stop.

SIGTERM or SIGINT: new requests get 503, answers in flight have `grace_s` to end; then they are
ended with an error, the port is closed, and after two seconds more what is left is cut off.
A second signal skips the wait.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from weft.core.errors import WeftError
from weft.server.answer import Gate
from weft.server.binding import check_bind

log = logging.getLogger("weft.server")

FORCE_AFTER_S = 2
KEEPALIVE_CONNECTION_S = 75
BACKLOG = 2048
MAX_HEADER_BYTES = 32 << 10


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: it would raise the signal again after the end, and
    end the process before the workers were stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises WeftError."""
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise WeftError(f"cannot serve on {host!r}: {error}; give an address with --host") from None
    family, kind, proto, _, address = found[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise WeftError(
            f"cannot serve on {host}:{port}: {error.strerror}; choose another with --port"
        ) from None
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    app: FastAPI,
    host: str,
    port: int,
    *,
    insecure: bool = False,
    on_ready: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
    grace_s: float = 10.0,
) -> None:
    """Serves until `stop` is set or, in the main thread, SIGTERM or SIGINT comes. `on_ready` gets
    the URL once connections are taken. Raises WeftError when the address cannot be served."""
    check_bind(host, insecure=insecure, has_keys=len(app.state.keys) > 0)
    sock = listen(host, port)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # our own lines say when it starts
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=KEEPALIVE_CONNECTION_S,
        timeout_graceful_shutdown=FORCE_AFTER_S,
    )
    server = _Server(config)
    stop = stop or asyncio.Event()
    gate: Gate = app.state.gate
    with _signals(stop, server), sock:
        running = asyncio.create_task(server.serve(sockets=[sock]))
        stopper = asyncio.create_task(_stop_when_told(stop, server, gate, grace_s))
        try:
            while not server.started and not running.done():
                await asyncio.sleep(0.01)
            if server.started:
                log.info("serving url=%s", url_of(sock))
                if on_ready is not None:
                    on_ready(url_of(sock))
            await running
            log.info("no longer serving")
        finally:
            stopper.cancel()
            server.should_exit = True
            if not running.done():
                gate.cut()
                await asyncio.wait({running})


async def _stop_when_told(
    stop: asyncio.Event, server: uvicorn.Server, gate: Gate, grace_s: float
) -> None:
    await stop.wait()
    gate.drain()
    log.info("stopping: %d answers in flight, %g s for them to end", len(gate.live), grace_s)
    deadline = asyncio.get_running_loop().time() + grace_s
    while gate.live and not server.force_exit and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    gate.cut()
    server.should_exit = True


@contextlib.contextmanager
def _signals(stop: asyncio.Event, server: uvicorn.Server) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`; the second one forces the end. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            server.force_exit = True
        stop.set()

    handled = (signal.SIGTERM, signal.SIGINT)
    for sig in handled:
        loop.add_signal_handler(sig, on_signal)
    try:
        yield
    finally:
        for sig in handled:
            loop.remove_signal_handler(sig)

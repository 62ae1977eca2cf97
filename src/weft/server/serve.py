"""Runs the application on a socket until it is told to stop.

SIGTERM or SIGINT: new requests get 503; those in flight, also the ones that are still being
tokenised, have `drain_s` to end; then they are
ended with an error, the port is closed, and after two seconds more what is left is cut off.
A second signal skips the wait.
"""

import asyncio
import contextlib
import functools
import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from weft.config.server_config import ServerConfig
from weft.core.errors import WeftError
from weft.server.answer import Gate
from weft.server.binding import check_bind
from weft.server.connection import SEND_BUFFER_BYTES, Bounds, Connection, sweep_for_ever

log = logging.getLogger("weft.server")

FORCE_AFTER_S = 2
BACKLOG = 2048
MAX_HEADER_BYTES = 32 << 10
SPARE_DESCRIPTORS = 256
"""For everything that is no client's connection."""


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: it would raise the signal again after the end, and
    end the process before the workers were stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises WeftError."""
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
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        sock.bind(address)
        sock.listen(BACKLOG)  # two may bind a port, but only one listens
    except OSError as error:
        sock.close()
        raise WeftError(
            f"cannot serve on {host}:{port}: {error.strerror}; choose another with --port"
        ) from None
    return sock


def raise_descriptor_limit(max_connections: int) -> int:
    """Let this process have a descriptor for each connection, as far as the system allows. The
    number of connections it then can have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            log.warning(
                "only %d descriptors are allowed (ulimit -n): %d connections at most",
                soft,
                max(1, soft - SPARE_DESCRIPTORS),
            )
            return max(1, soft - SPARE_DESCRIPTORS)
    return max_connections


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
    grace_s: float | None = None,
    sock: socket.socket | None = None,
) -> None:
    """Serves until `stop` is set or, in the main thread, SIGTERM or SIGINT comes. `on_ready` gets
    the URL once connections are taken. `sock`: from `listen`, where the port was taken before;
    `grace_s`: instead of the configured `drain_s`. Raises WeftError when the address cannot be
    served."""
    check_bind(host, insecure=insecure, has_keys=len(app.state.keys) > 0)
    sock = sock or listen(host, port)
    limits: ServerConfig = app.state.server_config
    bounds = Bounds(
        max_connections=raise_descriptor_limit(limits.max_connections),
        slow_reader_s=limits.slow_reader_s,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # our own lines say when it starts
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http=functools.partial(Connection, bounds=bounds),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=round(bounds.next_request_s),
        timeout_graceful_shutdown=FORCE_AFTER_S,
    )
    server = _Server(config)
    stop = stop or asyncio.Event()
    gate: Gate = app.state.gate
    with _signals(stop, server), sock:
        running = asyncio.create_task(server.serve(sockets=[sock]))
        drain_s = limits.drain_s if grace_s is None else grace_s
        helpers = [
            asyncio.create_task(_stop_when_told(stop, server, gate, drain_s)),
            asyncio.create_task(sweep_for_ever(server.server_state.connections, bounds)),
        ]
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
            for helper in helpers:
                helper.cancel()
            server.should_exit = True
            if not running.done():
                gate.cut()
                await asyncio.wait({running})


async def _stop_when_told(
    stop: asyncio.Event, server: uvicorn.Server, gate: Gate, grace_s: float
) -> None:
    await stop.wait()
    gate.drain()
    log.info("stopping: %d requests in flight, %g s for them to end", gate.inside, grace_s)
    deadline = asyncio.get_running_loop().time() + grace_s
    while gate.inside and not server.force_exit and asyncio.get_running_loop().time() < deadline:
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

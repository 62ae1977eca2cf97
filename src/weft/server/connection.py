"""One TCP connection within bounds: how many there are, how long one may wait for its next request,
how slowly one may read.

uvicorn has none of these: a connection that never sends a request, or never reads its answer, is
kept for ever. What waits for a client lies in the socket's buffer (SEND_BUFFER_BYTES, set where
the port is bound), in the transport (WRITE_BUFFER_BYTES and one event) and, as token ids, in the
hub (at most the request's max_tokens).
"""

import asyncio
import logging
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from weft.server.errors import ApiError

log = logging.getLogger("weft.server")

FIRST_REQUEST_S = 20.0
"""A new connection has this long to send the headers of its first request."""
NEXT_REQUEST_S = 75.0
"""And this long from the end of an answer to the headers of the next."""
WRITE_BUFFER_BYTES = 32 << 10
SEND_BUFFER_BYTES = 32 << 10
"""The kernel's send buffer of a connection (Linux doubles what is asked for)."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    max_connections: int
    slow_reader_s: float
    first_request_s: float = FIRST_REQUEST_S
    next_request_s: float = NEXT_REQUEST_S

    @property
    def sweep_s(self) -> float:
        """How often connections are looked at."""
        least = min(self.slow_reader_s, self.first_request_s, self.next_request_s)
        return max(0.02, min(least / 4, 5.0))


class _Counted:
    """A transport that counts what it was given to write."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    @property
    def waiting(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return self._transport.get_write_buffer_size()


class Connection(H11Protocol):
    """uvicorn's protocol with bounds; `sweep` has to be called on all of them now and then."""

    def __init__(
        self,
        *args: Any,
        bounds: Bounds,
        clock: Callable[[], float] = time.monotonic,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._bounds = bounds
        self._clock = clock
        self._out: _Counted | None = None
        self._taken = 0
        self._taken_s = self._idle_s = clock()
        self._answered = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        if len(self.connections) >= self._bounds.max_connections:
            self.transport = transport
            transport.write(_full())
            transport.close()
            return
        self._out = _Counted(transport)
        super().connection_made(cast(asyncio.Transport, self._out))

    def on_response_complete(self) -> None:
        self._answered = True
        self._idle_s = self._clock()
        super().on_response_complete()

    def sweep(self) -> None:
        """Cut the connection if it has used up its time."""
        if self._out is None or self.transport is None:
            return
        now_s = self._clock()
        taken = self._out.written - self._out.waiting
        if not self._out.waiting or taken != self._taken:
            self._taken, self._taken_s = taken, now_s
        elif now_s - self._taken_s >= self._bounds.slow_reader_s:
            log.info(
                "a connection is cut: its client took nothing for %.0f s", now_s - self._taken_s
            )
            self._cut()
            return
        # Also while a body comes that nobody reads any more: its request has been answered.
        if self.cycle is None or self.cycle.response_complete:
            bounds = self._bounds
            limit_s = bounds.next_request_s if self._answered else bounds.first_request_s
            if now_s - self._idle_s >= limit_s and not self._out.waiting:
                self._cut()

    def _cut(self) -> None:
        """Ends it at once: without lingering the kernel keeps what it holds for the client, too,
        and goes on offering it for many minutes."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


async def sweep_for_ever(connections: Iterable[object], bounds: Bounds) -> None:
    """Look at all connections every `sweep_s`."""
    while True:
        await asyncio.sleep(bounds.sweep_s)
        for connection in list(connections):
            if isinstance(connection, Connection):
                connection.sweep()


def _full() -> bytes:
    error = ApiError(503, "too many connections are open", code="too_many_connections")
    body = msgspec.json.encode(error.body())
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body

"""The response of a generating route: from opening its hub requests to their end.

Everything between `hub.open` and the last byte happens in `Answer.__call__`, so that one `finally`
gives back whatever was opened: the client read all of it, left in the middle, a stop string was
found, the server goes down.

A streamed answer waits up to HEADER_WAIT_S for its first chunk before it sends headers, so that
an immediate refusal or failure still becomes a real HTTP status; then the headers go out and an
SSE comment keeps the line alive every `keepalive_s`, also before the first token.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weft.core.errors import DRAINING, ReplyError
from weft.hub.base import Hub, HubRefusal
from weft.server import wire
from weft.server.attainment import slo_of
from weft.server.choice import Choice, Piece, joined
from weft.server.errors import CLIENT_CLOSED, ApiError, from_reply, internal_error
from weft.server.metrics import Metrics
from weft.server.plan import Plan
from weft.server.visit import Visit

HEADER_WAIT_S = 1.0

log = logging.getLogger("weft.server")

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Gate:
    """Open, then draining (new requests get 503), then cut (answers in flight end in an error)."""

    def __init__(self) -> None:
        self.draining = False
        self._is_cut = False
        self.live: set[Answer] = set()
        self.inside = 0
        """Requests past the door that may become answers, also while they are still read or
        tokenised: the end waits for them."""

    def drain(self) -> None:
        self.draining = True

    def cut(self) -> None:
        self.draining = self._is_cut = True
        for answer in tuple(self.live):
            answer.stop("cut")

    def enter(self, answer: "Answer") -> None:
        """One that was still being tokenised when all were cut ends at once."""
        self.live.add(answer)
        if self._is_cut:
            answer.stop("cut")

    def check(self) -> None:
        """Raises ApiError 503 when no new request may begin."""
        if self.draining:
            raise from_reply(ReplyError(code=DRAINING, message="the server is shutting down"))


class _Stopped(Exception):
    """The answer has to end now: "gone" (no client) or "cut" (no server)."""


class Answer(Response):
    """See the module's docstring. One object serves one request."""

    def __init__(
        self,
        hub: Hub,
        plan: Plan,
        metrics: Metrics,
        gate: Gate,
        *,
        request_id: str,
        arrival_s: float,
        keepalive_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._hub = hub
        self._plan = plan
        self._metrics = metrics
        self._gate = gate
        self._request_id = request_id
        self._arrival_s = arrival_s
        self._keepalive_s = keepalive_s
        self._clock = clock
        self._writer = plan.writer(request_id)
        self._choices: list[Choice] = []
        self._pulls: dict[asyncio.Task[Piece], Choice] = {}
        self._stop: asyncio.Future[str]
        self._status = 200
        self._started = False

    def stop(self, why: str) -> None:
        if not self._stop.done():
            self._stop.set_result(why)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._stop = asyncio.get_running_loop().create_future()
        watcher = asyncio.create_task(self._watch(receive))
        self._gate.enter(self)
        outcome = "error"
        try:
            self._open()
            await (self._stream(send) if self._plan.stream else self._whole(send))
        except ApiError as error:
            outcome = "refused" if self._unopened else "error"
            await self._fail(error, scope, receive, send)
        except _Stopped as stopped:
            outcome = "cancelled"
            await self._end_early(str(stopped), scope, receive, send)
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception:
            log.exception("request id=%s failed", self._request_id)
            await self._fail(internal_error(), scope, receive, send)
        finally:
            self._gate.live.discard(self)
            watcher.cancel()
            self._close(outcome, scope)

    @property
    def _unopened(self) -> int:
        return len(self._plan.requests) - len(self._choices)

    @property
    def _done(self) -> bool:
        return not self._unopened and all(choice.done for choice in self._choices)

    def _open(self) -> None:
        """Opens choices in their order, at most `window` at once; the first refusal ends all.
        Raises ApiError."""
        plan = self._plan
        room = plan.window - sum(not choice.done for choice in self._choices)
        opened = len(self._choices)
        try:
            for index in range(opened, min(opened + room, len(plan.requests))):
                choice = Choice(
                    self._hub,
                    plan.requests[index],
                    plan.decode,
                    plan.stops,
                    self._metrics,
                    index=index,
                    arrival_s=self._arrival_s,
                    slo=slo_of(plan.card),
                    counts_prompt=index % plan.choices_per_prompt == 0,
                    silent=plan.silent,
                    clock=self._clock,
                )
                self._choices.append(choice)
        except HubRefusal as refusal:
            raise from_reply(refusal.error) from None

    async def _stream(self, send: Send) -> None:
        """Raises ApiError only before the headers were sent."""
        pieces = await self._next(min(HEADER_WAIT_S, self._keepalive_s))
        for _, piece in pieces:
            if piece.error is not None:
                raise from_reply(piece.error)
        await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
        self._started = True
        opening = self._writer.opening() + (b"" if pieces else wire.HELD)
        if opening:
            await self._write(send, opening)
        spoken = False
        while True:
            for choice, piece in pieces:
                spoken = True
                if piece.error is not None:
                    raise from_reply(piece.error)
                await self._write(send, self._writer.chunk(choice, piece, self._choices))
            if self._done:
                break
            pieces = await self._next(self._keepalive_s)
            if not pieces:
                await self._write(send, wire.WAITING if spoken else wire.HELD)
        await self._write(send, self._writer.closing(self._choices), more=False)

    async def _whole(self, send: Send) -> None:
        """Raises ApiError."""
        pieces: list[list[Piece]] = [[] for _ in self._plan.requests]
        while not self._done:
            for choice, piece in await self._next(None):
                if piece.error is not None:
                    raise from_reply(piece.error)
                pieces[choice.index].append(piece)
        body = self._writer.whole(self._choices, [joined(parts) for parts in pieces])
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._started = True
        await self._write(send, body, more=False)

    async def _next(self, timeout_s: float | None) -> list[tuple[Choice, Piece]]:
        """Pieces that are there, at least one; [] when the time is over. At most one chunk of
        every choice is in hand. Raises _Stopped, and ApiError when a further choice is refused."""
        self._open()
        waiting = set(self._pulls.values())
        for choice in self._choices:
            if not choice.done and choice not in waiting:
                self._pulls[asyncio.create_task(choice.next())] = choice
        ends: set[asyncio.Future[Any]] = {self._stop, *self._pulls}
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._stop.done():
            raise _Stopped(self._stop.result())
        ready = [(task, choice) for task, choice in self._pulls.items() if task.done()]
        pieces: list[tuple[Choice, Piece]] = []
        for task, choice in ready:
            del self._pulls[task]
            pieces.append((choice, task.result()))
        return pieces

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        try:
            # A client that takes nothing is cut by its `Connection`, which ends this wait.
            await send({"type": "http.response.body", "body": body, "more_body": more})
        except OSError:  # what servers newer than ASGI 2.3 raise for a client that left
            raise _Stopped("gone") from None

    async def _watch(self, receive: Receive) -> None:
        """The body was read, so all that can still arrive is the end of the connection."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.stop("gone")

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """As a status while that is possible, as an SSE event afterwards."""
        self._status = error.status
        if not self._started:
            await error.response()(scope, receive, send)
        elif not self._stop.done():
            await self._last_words(error, send)

    async def _end_early(self, why: str, scope: Scope, receive: Receive, send: Send) -> None:
        if why == "gone":
            self._status = CLIENT_CLOSED
            return
        error = from_reply(ReplyError(code=DRAINING, message="the server is shutting down"))
        self._status = error.status
        if not self._started:
            await error.response()(scope, receive, send)
        else:
            await self._last_words(error, send)

    async def _last_words(self, error: ApiError, send: Send) -> None:
        try:
            await self._write(send, self._writer.failure(error), more=False)
        except _Stopped:
            self._status = CLIENT_CLOSED

    def _close(self, outcome: str, scope: Scope) -> None:
        for choice in self._choices:
            choice.abandon(outcome)
        for task in self._pulls:
            task.cancel()
            task.add_done_callback(_forget)
        model = self._plan.card.name
        for choice in self._choices:
            self._metrics.requests.labels(model, choice.outcome).inc()
            self._metrics.attainment.ended(model, choice)
        self._metrics.requests.labels(model, "refused").inc(self._unopened)
        ends = {choice.outcome for choice in self._choices} or {outcome}
        for state in sorted({"cancelled", "error"} & {str(end) for end in ends}):
            log.info("request=%s model=%s state=%s", self._request_id, model, state)
        visit: Visit | None = scope.get("state", {}).get("visit")
        if visit is not None:
            visit.outcome = ",".join(sorted(str(end) for end in ends))
            visit.left = self._status == CLIENT_CLOSED


def _forget(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()

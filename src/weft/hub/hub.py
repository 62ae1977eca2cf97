"""The hub: joins the pool's scheduler to clients on one side and units on the other.

It has no opinion. Every happening becomes a pool event, is handled at once in the event loop, and
the actions that come back are carried out in their order. Requests live in the scheduler's
journal; here is only the way to each client (a stream) and to each unit (the launcher).
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from weft.core.actions import Emit, KvGone, KvParked, Status, WeightsMoved
from weft.core.errors import ReplyError
from weft.core.events import Assign, Cancel, Submit, Unassign, UnitEvent, Unload, Warm
from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import Request, TokenLogprobs
from weft.core.unit import UnitStatus
from weft.hub.base import (
    Chunk,
    Health,
    HubRefusal,
    ModelCard,
    NewRequest,
    PoolView,
    UnitView,
)
from weft.hub.models import Models
from weft.pool import actions as act
from weft.pool import events as ev
from weft.pool.scheduler import PoolScheduler
from weft.transport.messages import (
    BindModel,
    Hello,
    HubMessage,
    StepRequests,
    Unbound,
    UnitEvents,
    UnitNotices,
    WorkerMessage,
)

log = logging.getLogger("weft.hub")

HEALTH_WINDOW_S = 30.0
MAX_TOKENS_A_CHUNK = 256
"""Tokens that a client gets at once: their text is made in the event loop's thread, at some
microseconds each."""
MAX_TOKENS_A_FRAME = 4_000_000
"""Prompt and emitted ids in one message to a worker; keeps frames below their bound."""


class Launcher(Protocol):
    """What the hub needs of the node agent. No method calls back into the hub before it returns."""

    def start(self, unit: int, incarnation: int) -> None:
        """Start a worker; the hub hears `unit_messages` with its Hello, or `unit_lost`."""
        ...

    def stop(self, unit: int, incarnation: int) -> None:
        """Kill it; the hub hears `unit_lost`."""
        ...

    def send(self, unit: int, incarnation: int, message: HubMessage) -> None:
        """To a worker that is gone: does nothing."""
        ...

    def host_usage(self) -> tuple[int, int]:
        """Size of the host store and the memory it holds, in bytes."""
        ...


class _Stream(AsyncIterator[Chunk]):
    """One client's way out. Tokens that were not fetched yet wait as one list and leave in chunks
    of at most MAX_TOKENS_A_CHUNK, so a slow client costs no more than its answer, and never the
    others the time to make text of all of it at once."""

    def __init__(self) -> None:
        self._tokens: deque[int] = deque()
        self._logprobs: deque[TokenLogprobs] = deque()
        """One for each of `_tokens`, or none at all."""
        self._first: Chunk | None = None
        """What was said of the prompt, until the first chunk takes it along."""
        self._end: Chunk | None = None
        self._came = asyncio.Event()
        self._ended = False

    @property
    def unfetched(self) -> int:
        return len(self._tokens)

    def put(self, chunk: Chunk) -> None:
        self._tokens.extend(chunk.tokens)
        self._logprobs.extend(chunk.logprobs)
        if chunk.prompt_logprobs or chunk.cached_tokens is not None:
            self._first = chunk
        if chunk.finish is not None:
            self._end = chunk
        self._came.set()

    async def __anext__(self) -> Chunk:
        if self._ended:
            raise StopAsyncIteration
        while not self._tokens and self._end is None:
            self._came.clear()
            await self._came.wait()
        count = min(len(self._tokens), MAX_TOKENS_A_CHUNK)
        tokens = tuple(self._tokens.popleft() for _ in range(count))
        logprobs = tuple(self._logprobs.popleft() for _ in range(min(count, len(self._logprobs))))
        first, self._first = self._first or Chunk(), None
        end = Chunk()
        if not self._tokens and self._end is not None:
            self._ended, end = True, self._end
        return Chunk(
            tokens=tokens,
            finish=end.finish,
            error=end.error,
            logprobs=logprobs,
            prompt_logprobs=first.prompt_logprobs,
            embedding=end.embedding,
            cached_tokens=first.cached_tokens,
        )


@dataclass(slots=True)
class _Instant:
    """What one decision sends to one unit."""

    bind: list[BindModel] = field(default_factory=list)
    events: list[UnitEvent] = field(default_factory=list)


class PoolHub:
    """Implements `weft.hub.base.Hub`. All methods are called in the event loop's thread."""

    def __init__(
        self,
        scheduler: PoolScheduler,
        launcher: Launcher,
        *,
        hold_s: float,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._scheduler = scheduler
        self._launcher = launcher
        self._hold_ns = round(hold_s * 1e9)
        self._clock = clock
        self._models = Models()
        self._devices: dict[int, str] = {}
        self._streams: dict[RequestId, _Stream] = {}
        self._rejected: dict[RequestId, ReplyError] = {}
        self._last_id = 0
        self._timer: asyncio.TimerHandle | None = None
        self._progress_ns = clock()
        self._drained = asyncio.Event()
        self.on_gone: Callable[[ModelName], None] = lambda _: None
        """Told when nobody uses a removed model any more; may not call back."""
        self.host_pinned = True
        """Some worker may have registered the host store: nothing in it may be punched."""

    # ------------------------------------------------------------------ for frontends

    def models(self) -> tuple[ModelCard, ...]:
        return tuple(self._models.cards.values())

    def open(self, new: NewRequest) -> tuple[RequestId, AsyncIterator[Chunk]]:
        """See `weft.hub.base.Hub.open`."""
        self._last_id += 1
        now_ns = self._clock()
        model, adapter = self._models.resolve(new.model)
        request = Request(
            id=RequestId(self._last_id),
            model=model,
            adapter=adapter,
            prompt=new.prompt,
            max_tokens=new.max_tokens,
            min_tokens=new.min_tokens,
            sampling=new.sampling,
            stop_ids=new.stop_ids,
            ignore_eos=new.ignore_eos,
            priority=new.priority,
            tenant=new.tenant,
            prompt_logprobs=new.prompt_logprobs,
            embed=new.embed,
            arrival_ns=now_ns,
            hold_deadline_ns=now_ns + self._hold_ns,
        )
        if not len(self._scheduler.journal):
            self._progress_ns = now_ns  # nothing waited until now
        stream = self._streams[request.id] = _Stream()
        self._handle([ev.NewRequest(request=request)])
        error = self._rejected.pop(request.id, None)
        if error is not None:
            del self._streams[request.id]
            raise HubRefusal(error)
        return request.id, stream

    def cancel(self, request: RequestId) -> None:
        self._handle([ev.ClientGone(request=request)])

    def view(self) -> PoolView:
        size, used = self._launcher.host_usage()
        return PoolView(
            models=self.models(),
            units=tuple(self._unit_views()),
            unfinished=len(self._scheduler.journal),
            host_store_bytes=size,
            host_store_used_bytes=used,
        )

    def _unit_views(self) -> Iterator[UnitView]:
        for unit in self._scheduler.units.values():
            yield UnitView(
                unit=unit.id,
                incarnation=unit.incarnation,
                device=self._devices.get(unit.id, ""),
                up=unit.up,
                restarts=max(0, unit.incarnation - 1),
                status=self._models.show(unit.status) if unit.status is not None else None,
            )

    def health(self) -> Health:
        waiting = len(self._scheduler.journal)
        since_s = (self._clock() - self._progress_ns) / 1e9 if waiting else 0.0
        return Health(
            healthy=since_s < HEALTH_WINDOW_S,
            ready=self._models.all_ready()
            and any(unit.up for unit in self._scheduler.units.values()),
            waiting=waiting,
            since_progress_s=since_s,
        )

    # ------------------------------------------------------------------ for the node

    def add_model(self, card: ModelCard, bind: BindModel) -> None:
        """Serve this model, in the place of one of the same name if there is any: that one's
        requests finish. Those of the new one wait until `model_ready`."""
        below = bind.model.name
        self._models.binds[below] = bind
        before = self._models.put(card, below)
        events: list[ev.PoolEvent] = [ev.ModelAdded(spec=bind.model)]
        if before is not None:
            events.append(ev.ModelRemoved(model=before))
        self._handle(events)

    def add_failed_model(self, card: ModelCard, below: ModelName | None = None) -> None:
        """A model of the configuration that cannot be served; `card.failed` says why."""
        below = below or ModelName(card.name)
        events: list[ev.PoolEvent] = [ev.ModelFailed(model=below, reason=card.failed or "failed")]
        before = self._models.put(card, below)
        if before is not None:
            events.append(ev.ModelRemoved(model=before))
        self._handle(events)

    def change_model(self, card: ModelCard, spec: ModelSpec) -> None:
        """Other aliases, defaults and wishes for a model that is served; the weights stay."""
        self._models.put(card, spec.name)
        bind = self._models.binds[spec.name]
        if bind.model != spec:
            self._models.binds[spec.name] = msgspec.structs.replace(bind, model=spec)
            self._handle([ev.ModelChanged(spec=spec)])

    def remove_model(self, name: str) -> None:
        """Refuse new requests for it; `on_gone` follows when the others have finished."""
        self._handle([ev.ModelRemoved(model=self._models.remove(name))])

    def model_ready(self, below: str) -> None:
        """Its weight image is in the host store. `below`: as in the BindModel of `add_model`."""
        self._models.ready.add(ModelName(below))
        self._handle([ev.ModelReady(model=ModelName(below))])

    def model_failed(self, below: str, reason: str) -> None:
        name = self._models.above(ModelName(below))
        if name is not None:
            card = msgspec.structs.replace(self._models.cards[name], failed=reason)
            self._models.put(card, ModelName(below))
        self._handle([ev.ModelFailed(model=ModelName(below), reason=reason)])

    def find(self, asked: str) -> ModelCard | None:
        """A served model by name or alias."""
        name = self._models.find(asked)
        return self._models.cards[name] if name is not None else None

    def spec(self, name: str) -> ModelSpec | None:
        """How a served model is scheduled now; None for one that cannot be served."""
        bind = self._models.binds.get(self._models.below(name))
        return bind.model if bind is not None else None

    def warm(self, name: str) -> None:
        """Bring its weights onto a device, now or as soon as it is ready."""
        self._handle([ev.WarmModel(model=self._models.below(name))])

    def unload(self, name: str) -> None:
        """Take its weights off the devices when it has no work."""
        self._handle([ev.UnloadModel(model=self._models.below(name))])

    def add_unit(self, unit: int) -> None:
        self._handle([ev.UnitAdded(unit=unit)])

    def note_progress(self) -> None:
        """Bytes of an image were copied: what waits for it does not wait in vain."""
        self._progress_ns = self._clock()

    def unit_messages(self, unit: int, messages: list[WorkerMessage]) -> None:
        """Everything that arrived from a worker at once: one instant."""
        events: list[ev.PoolEvent] = []
        for message in messages:
            incarnation = message.incarnation
            match message:
                case Hello(device=device, pins_host=pins_host):
                    self.host_pinned = pins_host
                    self._progress_ns = self._clock()  # what waited for it now begins
                    self._devices[unit] = device
                    events.append(ev.UnitUp(unit=unit, incarnation=incarnation))
                case StepRequests(requests=requests):
                    events.append(
                        ev.Stepping(unit=unit, incarnation=incarnation, requests=requests)
                    )
                case Unbound(models=models):
                    events += [
                        ev.Unbound(unit=unit, incarnation=incarnation, model=name)
                        for name in models
                    ]
                case UnitNotices():
                    events += self._from_notices(unit, message)
        if events:
            self._handle(events)

    def unit_lost(self, unit: int, incarnation: int, cause: str) -> None:
        """Its process is gone, and everything it said went through `unit_messages`."""
        self._handle([ev.UnitLost(unit=unit, incarnation=incarnation, cause=cause)])
        if self._scheduler.units[unit].down:
            log.error("unit=%d state=down reason=it will be tried again: %s", unit, cause)

    def drain(self) -> None:
        """Refuse new requests; `drained` returns when none is left."""
        self._handle([ev.DrainPool()])

    async def drained(self) -> None:
        while len(self._scheduler.journal):
            self._drained.clear()
            await self._drained.wait()

    def close(self) -> None:
        """Stop the timer and end every stream that is still open."""
        if self._timer is not None:
            self._timer.cancel()
        error = ReplyError(code="draining", message="the server is shutting down")
        for stream in self._streams.values():
            stream.put(Chunk(finish="error", error=error))
        self._streams.clear()

    # ------------------------------------------------------------------ events and actions

    def _from_notices(self, unit: int, message: UnitNotices) -> Iterator[ev.PoolEvent]:
        who = {"unit": unit, "incarnation": message.incarnation}
        for notice in message.notices:
            match notice:
                case Emit():
                    self._progress_ns = self._clock()
                    yield ev.Emitted(**who, emit=notice)
                case KvParked(request=request, kv=kv):
                    yield ev.KvParkedAt(**who, request=request, kv=kv)
                case KvGone(request=request):
                    yield ev.KvGoneAt(**who, request=request)
                case WeightsMoved():
                    self._log_move(unit, notice)
                case Status(status=status):
                    self._note_status(unit, status)
                    yield ev.UnitReport(**who, status=status)

    def _note_status(self, unit: int, status: UnitStatus) -> None:
        before = self._scheduler.units[unit].status
        if before is None or _progress(before) != _progress(status):
            self._progress_ns = self._clock()

    def _log_move(self, unit: int, move: WeightsMoved) -> None:
        """The story of the weights, one line a change."""
        name = self._models.above(move.model) or move.model
        if move.state == "failed":
            log.warning("model=%s state=failed unit=%d reason=%s", name, unit, move.cause)
            return
        log.info(
            "model=%s state=%s unit=%d cause=%s bytes=%d seconds=%.3f",
            name,
            move.state,
            unit,
            move.cause,
            move.num_bytes,
            move.duration_ns / 1e9,
        )

    def _handle(self, events: list[ev.PoolEvent]) -> None:
        instants: dict[tuple[int, int], _Instant] = {}
        for action in self._scheduler.handle(events, self._clock()):
            match action:
                case act.Reply():
                    self._reply(action)
                case act.Reject(request=request, error=error):
                    self._rejected[request] = error
                case act.ModelGone(model=model):
                    self._models.forget(model)
                    self.on_gone(model)
                case act.WakeAt(at_ns=at_ns):
                    self._set_timer(at_ns)
                case act.StartWorker(unit=unit, incarnation=incarnation):
                    self._launcher.start(unit, incarnation)
                case act.StopWorker(unit=unit, incarnation=incarnation):
                    self._launcher.stop(unit, incarnation)
                case _:
                    key = (action.unit, action.incarnation)
                    self._add(instants.setdefault(key, _Instant()), action)
        for (unit, incarnation), instant in instants.items():
            for message in _messages(incarnation, instant):
                self._launcher.send(unit, incarnation, message)
        if not len(self._scheduler.journal):
            self._drained.set()

    def _add(
        self,
        instant: _Instant,
        action: act.SubmitTo
        | act.CancelAt
        | act.AssignTo
        | act.UnassignFrom
        | act.WarmAt
        | act.UnloadAt,
    ) -> None:
        match action:
            case act.AssignTo(model=model):
                instant.bind.append(self._models.binds[model.name])
                instant.events.append(Assign(model=model))
            case act.UnassignFrom(model=name):
                instant.events.append(Unassign(model=name))
            case act.WarmAt(model=name):
                instant.events.append(Warm(model=name))
            case act.UnloadAt(model=name):
                instant.events.append(Unload(model=name))
            case act.SubmitTo(request=request, emitted=emitted, resume=resume):
                instant.events.append(Submit(request=request, emitted=emitted, resume=resume))
            case act.CancelAt(request=request_id):
                instant.events.append(Cancel(request=request_id))

    def _reply(self, reply: act.Reply) -> None:
        stream = self._streams.get(reply.request)
        if stream is None:
            return
        stream.put(
            Chunk(
                tokens=reply.tokens,
                finish=reply.finish,
                error=reply.error,
                logprobs=reply.logprobs,
                prompt_logprobs=reply.prompt_logprobs,
                embedding=reply.embedding,
                cached_tokens=reply.cached_tokens,
            )
        )
        if reply.finish is not None:
            del self._streams[reply.request]

    def _set_timer(self, at_ns: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, (at_ns - self._clock()) / 1e9)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(delay_s, lambda: self._handle([ev.Woke()]))


def _progress(status: UnitStatus) -> tuple[int, int, int]:
    return status.actions_done, status.bytes_copied, status.progress


def _messages(incarnation: int, instant: _Instant) -> Iterator[UnitEvents]:
    """The instant in frames of bounded size; all but the last say that there is more."""
    bind = tuple(instant.bind)
    events: list[UnitEvent] = []
    tokens = 0
    for event in instant.events:
        size = 0
        if isinstance(event, Submit):
            size = len(event.request.prompt) + len(event.emitted)
        if events and tokens + size > MAX_TOKENS_A_FRAME:
            yield UnitEvents(incarnation=incarnation, bind=bind, events=tuple(events), more=True)
            bind, events, tokens = (), [], 0
        events.append(event)
        tokens += size
    yield UnitEvents(incarnation=incarnation, bind=bind, events=tuple(events))

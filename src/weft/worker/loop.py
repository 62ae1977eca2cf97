"""The worker's loop: receive -> handle -> tell -> submit -> poll.

One thread, no queue of its own. Everything that happened is handed to the scheduler as one
instant; what it answers is told to the hub first and submitted second. That order is a promise
(`weft.core.actions`): when an action overwrites a host extent, the hub's socket already holds the
news that the extent's old content is gone, and a kill -9 in between loses nothing.
"""

import logging
import selectors
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from weft.core.actions import CopyKv, Run, Status, UnitAction, UnitNotice, WakeAt
from weft.core.events import (
    Assign,
    BindFailed,
    CopyDone,
    Done,
    Failed,
    ReportStatus,
    StepDone,
    Unassign,
    UnitEvent,
    Woke,
)
from weft.core.ids import ActionId, ModelName, RequestId
from weft.core.request import Extent
from weft.engine.base import Executor
from weft.transport.channel import WorkerChannel
from weft.transport.messages import (
    Configure,
    Shutdown,
    StepRequests,
    Unbound,
    UnitEvents,
    UnitNotices,
)
from weft.worker.trace import Recorder

log = logging.getLogger("weft.worker")

REPORT_EVERY_NS = 100_000_000
"""A status at most this often while things happen."""
HEARTBEAT_NS = 5_000_000_000
"""And at least this often while requests wait for something that takes long."""


class Scheduler(Protocol):
    """What the loop needs of `weft.sched.scheduler.UnitScheduler`."""

    def handle(
        self, events: Sequence[UnitEvent], now_ns: int
    ) -> Sequence[UnitAction | UnitNotice]: ...

    def check_integrity(self) -> None: ...

    def mapped(self) -> dict[str, tuple[int, ...]]:
        """Per "model/weights" and "model/kv" of every model it knows."""
        ...

    @property
    def idle(self) -> bool:
        """Nothing in flight and nobody here."""
        ...

    def unused_host(self) -> tuple[Extent, ...]:
        """The region for parked KV without what lies in it."""
        ...


class Worker:
    """Joins one scheduler, one executor and the channel to the hub."""

    def __init__(
        self,
        incarnation: int,
        channel: WorkerChannel,
        scheduler: Scheduler,
        executor: Executor,
        *,
        recorder: Recorder | None = None,
        check: bool = False,
        forget_parked: Callable[[Sequence[Extent]], None] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`forget_parked` gives memory of the region for parked KV back; it is called when the
        unit has become idle, with what is unused then. None where that memory is registered with
        a device."""
        self._incarnation = incarnation
        self._channel = channel
        self._scheduler = scheduler
        self._executor = executor
        self._recorder = recorder
        self._check = check
        self._clock = clock
        self._forget_parked = forget_parked
        # An earlier incarnation may have left something.
        self._may_hold_parked = True
        self._bound: set[ModelName] = set()
        self._leaving: set[ModelName] = set()
        """Unassigned, not yet forgotten by the scheduler."""
        self._in_flight: dict[ActionId, UnitAction] = {}
        self._told_steps: frozenset[RequestId] = frozenset()
        self._wake_ns: int | None = None
        self._reported_ns = clock()
        self._unreported = False
        self._waiting = 0
        self._stopping = False

    def run(self) -> None:
        """Until a Shutdown message. Raises ChannelClosed when the hub is gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel.fileno(), selectors.EVENT_READ)
            selector.register(self._executor.wait_fd(), selectors.EVENT_READ)
            while True:
                events = self.gather()
                if self._stopping:
                    return
                if events:
                    self.decide(events)
                else:
                    selector.select(self._timeout_s())

    def gather(self) -> list[UnitEvent]:
        """Everything that happened since the last call: one instant."""
        events = self._receive()
        for event in self._executor.poll():
            events.append(event)
            self._ended(event)
        now_ns = self._clock()
        if self._wake_ns is not None and now_ns >= self._wake_ns:
            self._wake_ns = None
            events.append(Woke())
        self._unreported = self._unreported or bool(events)
        if now_ns >= self._report_due_ns():
            events.append(ReportStatus())
        return events

    def decide(self, events: Sequence[UnitEvent]) -> None:
        """One decision: told, then submitted."""
        planned_ns = self._clock()
        actions: list[UnitAction] = []
        notices: list[UnitNotice] = []
        for item in self._scheduler.handle(events, planned_ns):
            if isinstance(item, WakeAt):
                self._wake_ns = item.at_ns
            elif isinstance(item, UnitAction):
                actions.append(item)
            else:
                notices.append(item)
        self._tell(notices)
        self._tell_steps(actions)
        for action in actions:
            self._in_flight[action.id] = action
            self._executor.submit(action)
            if self._recorder:
                self._recorder.submitted(action, planned_ns, self._clock())
        self._unbind(events)
        self._release_parked(actions)
        if self._check and not self._waiting and not self._in_flight:
            self._scheduler.check_integrity()
            self._executor.check_integrity(mapped=self._scheduler.mapped())

    def _release_parked(self, actions: Sequence[UnitAction]) -> None:
        """Nobody is parked when nobody is here: what parking took becomes free memory again, but
        for what the prefix cache keeps. What an earlier incarnation parked comes back in the first
        instant of this one, with its requests, or never."""
        for action in actions:
            if isinstance(action, CopyKv) and action.to == "host":
                self._may_hold_parked = True
        if self._forget_parked and self._may_hold_parked and self._bound and self._scheduler.idle:
            self._forget_parked(self._scheduler.unused_host())
            self._may_hold_parked = False

    def _receive(self) -> list[UnitEvent]:
        """Events from the hub; an instant that spans several messages is waited for whole."""
        events: list[UnitEvent] = []
        more = False
        while True:
            for message in self._channel.receive(None if more else 0.0):
                match message:
                    case UnitEvents() if message.incarnation == self._incarnation:
                        failed = self._bind(message)
                        events += message.events
                        events += failed
                        more = message.more
                    case Shutdown():
                        self._stopping = True
                        return []
                    case UnitEvents() | Configure():
                        raise AssertionError(f"not for this incarnation: {type(message).__name__}")
            if not more:
                return events

    def _bind(self, message: UnitEvents) -> list[BindFailed]:
        failed: list[BindFailed] = []
        for bind in message.bind:
            if bind.model.name in self._bound:
                continue
            try:
                self._executor.bind(bind.model, bind.arch, bind.image, bind.adapter)
            except Exception as error:
                # No room for its tables, say: a fault of one model. The scheduler refuses its
                # requests, and the others are served.
                log.exception("model=%s cannot be bound", bind.model.name)
                lines = str(error).splitlines()
                reason = lines[0] if lines else type(error).__name__
                failed.append(BindFailed(model=bind.model.name, reason=reason[:500]))
            else:
                self._bound.add(bind.model.name)
        return failed

    def _unbind(self, events: Sequence[UnitEvent]) -> None:
        """Give back the address ranges of unassigned models, once the scheduler has forgotten
        them: their last request, drop and unmapping have ended."""
        for event in events:
            match event:
                case Assign(model=model):
                    self._leaving.discard(model.name)
                case Unassign(model=name):
                    self._leaving.add(name)
        if not self._leaving:
            return
        known = self._scheduler.mapped()
        gone = sorted(name for name in self._leaving if f"{name}/kv" not in known)
        if not gone:
            return
        for name in gone:
            self._leaving.remove(name)
            if name in self._bound:
                self._bound.remove(name)
                self._executor.unbind(name)
        self._channel.send(Unbound(incarnation=self._incarnation, models=tuple(gone)))

    def _ended(self, event: UnitEvent) -> None:
        if self._recorder:
            self._recorder.ended(event, self._clock())
        match event:
            case StepDone(last=False):
                return
            case StepDone() | CopyDone() | Done() | Failed():
                del self._in_flight[event.action]

    def _tell(self, notices: list[UnitNotice]) -> None:
        if not notices:
            return
        notices = [self._with_progress(notice) for notice in notices]
        self._channel.send(UnitNotices(incarnation=self._incarnation, notices=tuple(notices)))
        for notice in notices:
            if isinstance(notice, Status):
                self._reported_ns = self._clock()
                self._unreported = False
                self._waiting = notice.status.waiting

    def _with_progress(self, notice: UnitNotice) -> UnitNotice:
        if not isinstance(notice, Status):
            return notice
        progress = self._executor.progress()
        return Status(status=msgspec.structs.replace(notice.status, progress=progress))

    def _tell_steps(self, actions: list[UnitAction]) -> None:
        """Name the suspects before the step that could kill us. A batch that goes on is not
        named again: most decisions send nothing here."""
        if not any(isinstance(action, Run) for action in actions):
            return
        steps = frozenset(
            row.request
            for action in (*self._in_flight.values(), *actions)
            if isinstance(action, Run)
            for row in action.plan.rows
        )
        if not steps <= self._told_steps:
            self._told_steps = steps
            self._channel.send(
                StepRequests(incarnation=self._incarnation, requests=tuple(sorted(steps)))
            )

    def _report_due_ns(self) -> float:
        if self._unreported:
            return self._reported_ns + REPORT_EVERY_NS
        return self._reported_ns + HEARTBEAT_NS if self._waiting else float("inf")

    def _timeout_s(self) -> float | None:
        wake_ns = self._wake_ns if self._wake_ns is not None else float("inf")
        due_ns = min(self._report_due_ns(), wake_ns)
        if due_ns == float("inf"):
            return None
        return max(0.0, (due_ns - self._clock()) / 1e9)

"""A unit without a model: a scheduler and an executor small enough to be believed at sight.

Token i of a request is `answer(prompt, i)`, whatever happened before. Requests run in one batch;
now and then one is parked: its page of the host store is filled with its id and length, and when
pages are short another request's page is given away and overwritten at once, so that a hub that
did not hear `KvGone` in time would resume from a page that is somebody else's. The executor checks
every page it resumes from and calls a difference a bug.

Prompts do things: the first id DIES_AT_ONCE kills the worker before its first token, DIES_LATER
after two tokens, RAISES lets the scheduler raise.
"""

import os
import signal
import struct
from collections import deque
from collections.abc import Sequence

from weft.core.actions import (
    CopyKv,
    Emit,
    KvGone,
    KvParked,
    Row,
    Run,
    Status,
    StepPlan,
    UnitAction,
    UnitNotice,
)
from weft.core.events import Assign, Cancel, CopyDone, ReportStatus, StepDone, Submit, UnitEvent
from weft.core.ids import ActionId, ModelName, RequestId, SlotId
from weft.core.model import AdapterShape, Architecture, ModelSpec
from weft.core.request import Extent, ParkedKv, Request
from weft.core.unit import UnitSpec, UnitStatus
from weft.engine.base import ImageRef
from weft.memory.host_store import HostStore
from weft.transport.messages import WorkerConfig
from weft.worker.process import BuiltUnit

DIES_AT_ONCE, DIES_LATER, RAISES = 901, 902, 903
DIES_IN_COPY = "FAKE_UNIT_DIES_IN_COPY"
PAGE_BYTES = 4096
STEP_ROWS = 4
PARK_EVERY = 3
"""Steps."""


def answer(prompt: tuple[int, ...], index: int) -> int:
    return (sum(prompt) * 31 + index * 7) % 1000


class _State:
    def __init__(self, request: Request, emitted: tuple[int, ...]) -> None:
        self.request = request
        self.done = len(emitted)
        self.parked: ParkedKv | None = None
        self.resuming = False


class FakeScheduler:
    def __init__(self, unit: UnitSpec) -> None:
        self._states: dict[RequestId, _State] = {}
        self._free = [
            Extent(unit.host_offset + at, PAGE_BYTES)
            for at in range(0, unit.host_bytes - PAGE_BYTES + 1, PAGE_BYTES)
        ]
        self._models: set[ModelName] = set()
        self._copies: dict[ActionId, CopyKv] = {}
        self._running: list[RequestId] = []
        self._next = 0
        self._steps = 0
        self._done = 0
        self._out: list[UnitAction | UnitNotice] = []

    def handle(self, events: Sequence[UnitEvent], now_ns: int) -> Sequence[UnitAction | UnitNotice]:
        self._out = []
        for event in events:
            self._on(event)
        if not self._running and not self._copies:
            self._step()
        if any(isinstance(event, ReportStatus) for event in events):
            self._out.append(Status(status=self._status(now_ns)))
        return self._out

    def _on(self, event: UnitEvent) -> None:
        match event:
            case Assign(model=model):
                self._models.add(model.name)
            case Submit(request=request, emitted=emitted, resume=resume):
                assert request.model in self._models, "not assigned"
                assert request.prompt[0] != RAISES, "the request asked for it"
                state = self._states[request.id] = _State(request, emitted)
                if resume is not None:
                    for extent in resume.extents:
                        self._free.remove(extent)
                    state.parked, state.resuming = resume, True
            case Cancel(request=request_id):
                if request_id in self._states:
                    self._finish(
                        request_id, Emit(request=request_id, tokens=(), finish="cancelled")
                    )
            case StepDone():
                self._done += 1
                running, self._running = self._running, []
                for request_id in running:
                    self._advance(request_id)
            case CopyDone(action=action):
                self._done += 1
                self._copied(self._copies.pop(action))

    def _advance(self, request_id: RequestId) -> None:
        state = self._states.get(request_id)
        if state is None:
            return
        token = answer(state.request.prompt, state.done)
        state.done += 1
        if state.done == state.request.max_tokens:
            self._finish(request_id, Emit(request=request_id, tokens=(token,), finish="length"))
        else:
            self._out.append(Emit(request=request_id, tokens=(token,)))

    def _finish(self, request_id: RequestId, emit: Emit) -> None:
        state = self._states.pop(request_id)
        if state.parked is not None and all(c.request != request_id for c in self._copies.values()):
            self._free.extend(state.parked.extents)
        self._out.append(emit)

    def _copied(self, copy: CopyKv) -> None:
        state = self._states.get(copy.request)
        if state is None:
            self._free.extend(copy.extents)
        elif copy.to == "host":
            kv = ParkedKv(extents=copy.extents, tokens=copy.tokens)
            state.parked = kv
            self._out.append(KvParked(request=copy.request, kv=kv))
        else:
            state.resuming = False

    def _step(self) -> None:
        """One step, resumes first; every few steps somebody is parked as well."""
        for request_id, state in self._states.items():
            if state.resuming and state.parked is not None:
                self._copy(request_id, state.parked.extents, state.parked.tokens, "device")
        if self._copies:
            return
        ids = list(self._states)
        start = self._steps % len(ids) if ids else 0
        self._running = (ids[start:] + ids[:start])[:STEP_ROWS]
        if not self._running:
            return
        self._steps += 1
        if self._steps % PARK_EVERY == 0:
            self._park(self._running[0])
        rows = tuple(self._row(self._states[r]) for r in self._running)
        plan = StepPlan(model=self._states[self._running[0]].request.model, rows=rows)
        self._out.append(Run(id=self._id(), plan=plan))

    def _row(self, state: _State) -> Row:
        marker = state.request.prompt[0]
        dies = marker == DIES_AT_ONCE or (marker == DIES_LATER and state.done == 2)
        return Row(
            request=state.request.id,
            slot=SlotId(0),
            start=state.done,
            num_tokens=1,
            input=(DIES_AT_ONCE if dies else 0,),
            sample=state.request.sampling,
        )

    def _park(self, request_id: RequestId) -> None:
        state = self._states[request_id]
        if state.parked is not None:
            return
        if not self._free:
            victim = next((s for s in self._states.values() if s.parked is not None), None)
            if victim is None or victim.parked is None:
                return
            self._free.extend(victim.parked.extents)
            victim.parked = None
            self._out.append(KvGone(request=victim.request.id))
        self._copy(request_id, (self._free.pop(),), 1 + state.done, "host")

    def _copy(
        self, request_id: RequestId, extents: tuple[Extent, ...], tokens: int, to: str
    ) -> None:
        copy = CopyKv(
            id=self._id(),
            model=self._states[request_id].request.model,
            request=request_id,
            pages=(),
            extents=extents,
            tokens=tokens,
            to=to,  # type: ignore[arg-type]
        )
        self._copies[copy.id] = copy
        self._out.append(copy)

    def _id(self) -> ActionId:
        self._next += 1
        return ActionId(self._next)

    def _status(self, now_ns: int) -> UnitStatus:
        return UnitStatus(
            at_ns=now_ns,
            models=(),
            free_granules=0,
            num_granules=0,
            host_used_bytes=0,
            host_bytes=0,
            actions_done=self._done,
            bytes_copied=0,
            waiting=len(self._states),
        )

    def check_integrity(self) -> None:
        assert not self._states or self._models

    @property
    def idle(self) -> bool:
        return False

    def unused_host(self) -> tuple[Extent, ...]:
        return ()

    def mapped(self) -> dict[str, tuple[int, ...]]:
        return {}


class FakeExecutor:
    """Ends every action at once."""

    def __init__(self, host: HostStore) -> None:
        self._host = host
        self._pages_to_live = int(os.environ.get(DIES_IN_COPY, "0"))
        """Dies right after overwriting so many pages; 0: never."""
        self._ends: deque[UnitEvent] = deque()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.bound: list[ModelName] = []

    def bind(
        self,
        model: ModelSpec,
        arch: Architecture,
        image: ImageRef,
        adapter: AdapterShape | None = None,
    ) -> None:
        self.bound.append(model.name)

    def unbind(self, model: ModelName) -> None:
        self.bound.remove(model)

    def submit(self, action: UnitAction) -> None:
        match action:
            case Run(plan=plan):
                if any(row.input == (DIES_AT_ONCE,) for row in plan.rows):
                    os.kill(os.getpid(), signal.SIGKILL)
                tokens = (tuple(0 for _ in plan.rows),)
                self._ends.append(
                    StepDone(action=action.id, iterations=1, last=True, tokens=tokens)
                )
            case CopyKv(extents=extents):
                for extent in extents:
                    self._page(action, extent)
                self._ends.append(CopyDone(action=action.id, num_bytes=PAGE_BYTES * len(extents)))
            case _:
                raise AssertionError(f"unexpected {action}")
        os.eventfd_write(self._fd, 1)

    def _page(self, copy: CopyKv, extent: Extent) -> None:
        content = struct.pack("<QQ", copy.request, copy.tokens) * (PAGE_BYTES // 16)
        page = self._host.view(extent.offset, extent.num_bytes)
        if copy.to == "host":
            page[:] = content
            self._pages_to_live -= 1
            if self._pages_to_live == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        else:
            assert page == content, f"the page of request {copy.request} holds another's KV"

    def progress(self) -> int:
        return 0

    def poll(self) -> Sequence[UnitEvent]:
        if self._ends:
            os.eventfd_read(self._fd)
        ends, self._ends = list(self._ends), deque()
        return ends

    def wait_fd(self) -> int:
        return self._fd

    def check_integrity(self, *, mapped: dict[str, tuple[int, ...]]) -> None:
        assert mapped == {}

    def close(self) -> None:
        os.close(self._fd)


def build_fake(config: WorkerConfig, host: HostStore) -> BuiltUnit:
    spec = UnitSpec(
        granule_bytes=PAGE_BYTES,
        num_granules=1,
        host_offset=config.host_offset,
        host_bytes=config.host_bytes,
    )
    return BuiltUnit("fake", spec, FakeScheduler(spec), FakeExecutor(host))

"""The real scheduler over the CUDA executor in one process, on the real clock: the worker's loop
without sockets, keeping a record of what happened when."""

import select
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from weft.core.actions import CopyKv, Drop, Emit, Load, Run, UnitAction, WakeAt
from weft.core.events import Assign, CopyDone, Failed, StepDone, Submit, UnitEvent, Woke
from weft.core.ids import ActionId, ModelName, RequestId
from weft.core.model import Architecture, ModelSpec
from weft.core.request import Request, Sampling
from weft.core.unit import UnitSpec
from weft.engine.base import ImageRef
from weft.engine.cuda_executor import CudaExecutor
from weft.engine.runner import LogitsTap
from weft.memory.host_store import HostStore
from weft.policy.presets import preset
from weft.sched.scheduler import UnitScheduler
from weft.sim.plan_record import PlanRecorder

STUCK_S = 120.0


@dataclass
class Rig:
    """One image in a host store, served under several names: each its own copy on the device.

    Also what the plan replayer's driver wants to see of an engine (`unit`, `executor`)."""

    host: HostStore
    arch: Architecture
    specs: Sequence[ModelSpec]
    unit: UnitSpec
    key: str
    verify: bool = False
    logits_tap: LogitsTap | None = None
    executor: CudaExecutor = field(init=False)

    def __enter__(self) -> Self:
        self.executor = CudaExecutor(
            self.unit, self.host, verify=self.verify, logits_tap=self.logits_tap
        )
        for spec in self.specs:
            image = ImageRef(key=self.key, offset=0, num_bytes=spec.weight_bytes)
            self.executor.bind(spec, self.arch, image)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.executor.close()

    def wait_registered(self, num_bytes: int) -> float:
        """Until so much of the host store is pinned. Returns seconds."""
        begin = time.perf_counter()
        while self.executor.registered_bytes() < num_bytes:
            if time.perf_counter() - begin > STUCK_S:
                raise TimeoutError("the host store is not registered")
            time.sleep(0.02)
        return time.perf_counter() - begin


@dataclass(frozen=True)
class Token:
    """One drawn token of one row, when it was known on the host."""

    request: RequestId
    model: ModelName
    at_ns: int


@dataclass(frozen=True)
class Moved:
    """A Load, Drop or CopyKv that ended."""

    action: UnitAction
    submitted_ns: int
    ended_ns: int
    num_bytes: int
    device_ns: int


class Drive:
    """Submit requests, run until something is true, read the record."""

    def __init__(self, rig: Rig, *, policy: str = "weft", turn_s: float | None = None) -> None:
        self.rig = rig
        self.scheduler = UnitScheduler(rig.unit, preset(policy, turn_s=turn_s))
        self.recorder = PlanRecorder()
        self.emitted: dict[RequestId, list[int]] = {}
        self.finished: dict[RequestId, str] = {}
        self.errors: list[str] = []
        self.tokens: list[Token] = []
        self.moved: list[Moved] = []
        self.step_device_ns: list[int] = []
        self.loop_ns = {"handle": 0, "submit": 0, "poll": 0}
        self._actions: dict[ActionId, tuple[UnitAction, int]] = {}
        self._wake_ns: int | None = None
        self._next: list[UnitEvent] = [Assign(model=spec) for spec in rig.specs]
        self._next_id = 1

    @property
    def open(self) -> int:
        return len(self.emitted) - len(self.finished)

    @property
    def loads(self) -> int:
        """Loads that ended."""
        return sum(isinstance(moved.action, Load) for moved in self.moved)

    def request(
        self, model: str, prompt: Iterable[int], max_tokens: int, sampling: Sampling | None = None
    ) -> RequestId:
        number = RequestId(self._next_id)
        self._next_id += 1
        self.emitted[number] = []
        request = Request(
            id=number,
            model=ModelName(model),
            prompt=tuple(prompt),
            max_tokens=max_tokens,
            sampling=sampling or Sampling(),
            ignore_eos=True,
            arrival_ns=time.monotonic_ns(),
        )
        self.tell(Submit(request=request))
        return number

    def tell(self, event: UnitEvent) -> None:
        self._next.append(event)

    def run_until(self, enough: Callable[[], bool], limit_s: float = STUCK_S) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + limit_s
        while not enough():
            events = self._gather()
            if events:
                self._decide(events)
                continue
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError(f"not reached in {limit_s} s; {self.errors[:3]}")
            wait_s = deadline - now
            if self._wake_ns is not None:
                wait_s = min(wait_s, max(0.0, self._wake_ns / 1e9 - now))
            select.select([self.rig.executor.wait_fd()], [], [], wait_s)

    def drain(self, limit_s: float = STUCK_S) -> None:
        """Until nothing is open or in flight; ledger and arena must agree then."""
        self.run_until(lambda: not self.open and not self._actions and not self._next, limit_s)
        self.scheduler.check_integrity()
        self.rig.executor.check_integrity(mapped=self.scheduler.mapped())

    def _gather(self) -> list[UnitEvent]:
        events, self._next = self._next, []
        begin = time.perf_counter_ns()
        fresh = self.rig.executor.poll()
        self.loop_ns["poll"] += time.perf_counter_ns() - begin
        now_ns = time.monotonic_ns()
        for event in fresh:
            self._note(event, now_ns)
        events += fresh
        if self._wake_ns is not None and now_ns >= self._wake_ns:
            self._wake_ns = None
            events.append(Woke())
        return events

    def _note(self, event: UnitEvent, now_ns: int) -> None:
        self.recorder.ended([event])
        match event:
            case StepDone():
                run = self._actions[event.action][0]
                assert isinstance(run, Run)
                for tokens, at_ns in zip(event.tokens, event.token_ns, strict=True):
                    self.step_device_ns.append(event.device_ns // event.iterations)
                    for row, token in zip(run.plan.rows, tokens, strict=True):
                        if token >= 0:
                            self.tokens.append(Token(row.request, run.plan.model, at_ns))
                if event.last:
                    del self._actions[event.action]
            case Failed():
                action, _ = self._actions.pop(event.action)
                self.errors.append(f"{type(action).__name__}: {event.cause}")
            case _:
                action, submitted_ns = self._actions.pop(getattr(event, "action"))  # noqa: B009
                if isinstance(action, Load | Drop | CopyKv):
                    done = event if isinstance(event, CopyDone) else None
                    self.moved.append(
                        Moved(
                            action,
                            submitted_ns,
                            now_ns,
                            done.num_bytes if done else 0,
                            done.device_ns if done else 0,
                        )
                    )

    def _decide(self, events: Sequence[UnitEvent]) -> None:
        begin = time.perf_counter_ns()
        out = self.scheduler.handle(events, time.monotonic_ns())
        decided = time.perf_counter_ns()
        self.loop_ns["handle"] += decided - begin
        for item in out:
            if isinstance(item, UnitAction):
                self.recorder.submitted(item)
                self._actions[item.id] = (item, time.monotonic_ns())
                self.rig.executor.submit(item)
            elif isinstance(item, WakeAt):
                self._wake_ns = item.at_ns
            elif isinstance(item, Emit):
                self.emitted[item.request].extend(item.tokens)
                if item.finish is not None:
                    self.finished[item.request] = item.finish
                if item.error is not None:
                    self.errors.append(item.error)
        self.loop_ns["submit"] += time.perf_counter_ns() - decided

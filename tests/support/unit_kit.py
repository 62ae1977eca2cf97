"""The unit's scheduler over a real executor, in one thread and on a logical clock.

Every decision advances the clock by a fixed amount, so turns pass after so many decisions however
fast the machine is; while nothing is in flight the clock jumps to the next WakeAt.
"""

from collections.abc import Sequence

from support.engine_kit import Engine, await_events, is_end
from weft.core.actions import Emit, KvGone, KvParked, UnitAction, WakeAt
from weft.core.events import Assign, Failed, Submit, UnitEvent, Woke
from weft.core.ids import ActionId, RequestId
from weft.core.request import FinishReason, ParkedKv, Request, TokenLogprobs
from weft.policy.presets import preset
from weft.sched.scheduler import UnitScheduler
from weft.sim.plan_record import PlanRecorder

DECISION_NS = 1_000_000


class UnitRun:
    """Submit events, `step` until `idle`; what was emitted is in `tokens` and `finish`."""

    def __init__(self, engine: Engine, *, policy: str = "weft", turn_s: float = 0.01) -> None:
        self.engine = engine
        self.scheduler = UnitScheduler(engine.unit, preset(policy, turn_s=turn_s))
        self.recorder = PlanRecorder()
        self.tokens: dict[RequestId, list[int]] = {}
        self.finish: dict[RequestId, FinishReason] = {}
        self.errors: dict[RequestId, str] = {}
        self.logprobs: dict[RequestId, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = {}
        self.embeddings: dict[RequestId, tuple[bytes, ...]] = {}
        self.parked: dict[RequestId, ParkedKv] = {}
        self.actions: list[UnitAction] = []
        """Everything submitted, in order."""
        self.now_ns = 0
        self._wake_ns: int | None = None
        self._in_flight: set[ActionId] = set()
        self._open: set[RequestId] = set()
        self._next: list[UnitEvent] = [Assign(model=m.spec) for m in engine.models.values()]

    @property
    def idle(self) -> bool:
        """Every request submitted has its end, and nothing is in flight."""
        return not self._open and not self._in_flight and not self._next

    def request(self, request: Request, emitted: Sequence[int] = ()) -> None:
        """To be told at the next step, as having arrived now."""
        self._open.add(request.id)
        self.tokens[request.id] = list(emitted)
        self.tell(Submit(request=request, emitted=tuple(emitted)))

    def tell(self, event: UnitEvent) -> None:
        self._next.append(event)

    def step(self) -> None:
        """One decision, after waiting for something to happen."""
        events, self._next = self._next, []
        if not events and self._in_flight:
            events = await_events(self.engine.executor, lambda seen: bool(seen))
        elif not events:
            if self._wake_ns is None:
                raise AssertionError(f"stuck: {sorted(self._open)} open and nothing to wait for")
            self.now_ns, self._wake_ns = max(self.now_ns, self._wake_ns), None
            events = [Woke()]
        for event in events:
            # The scheduler would compute the KV again, and no stream would show the lost bytes.
            if isinstance(event, Failed) and "ChecksumError" in event.cause:
                raise AssertionError(event)
        self.recorder.ended(events)
        ended = {getattr(event, "action", None) for event in events if is_end(event)}
        self._in_flight -= ended
        self.now_ns += DECISION_NS
        for item in self.scheduler.handle(events, self.now_ns):
            self._carry_out(item)

    def drain(self) -> None:
        """Step until idle, then compare ledger and arena."""
        while not self.idle:
            self.step()
        self.scheduler.check_integrity()
        self.engine.executor.check_integrity(mapped=self.scheduler.mapped())

    def _carry_out(self, item: object) -> None:
        match item:
            case Emit():
                assert item.request not in self.finish, f"request {item.request}: after its end"
                self.tokens[item.request].extend(item.tokens)
                self.logprobs.setdefault(item.request, []).extend(item.logprobs)
                if item.prompt_logprobs:
                    assert item.request not in self.prompt_logprobs, "prompt scores came twice"
                    self.prompt_logprobs[item.request] = item.prompt_logprobs
                if item.embedding:
                    self.embeddings[item.request] = item.embedding
                if item.finish is not None:
                    self.finish[item.request] = item.finish
                    self._open.remove(item.request)
                if item.error is not None:
                    self.errors[item.request] = item.error
            case WakeAt():
                self._wake_ns = item.at_ns
            case KvParked():
                self.parked[item.request] = item.kv
            case KvGone():
                self.parked.pop(item.request, None)
            case _ if isinstance(item, UnitAction):
                self.actions.append(item)
                self.recorder.submitted(item)
                self._in_flight.add(item.id)
                self.engine.executor.submit(item)
            case _:
                pass

"""The pool's scheduler: admits, dispatches, keeps the journal, and survives its workers.

`handle(events, now_ns) -> list[PoolAction]`: a plain object; no clock, socket or thread inside.

What holds after every decision:
- every admitted request is in the journal once, and ends in exactly one Reply with `finish`;
- the tokens of its Replies, joined, are what units emitted for it, never revoked, never repeated:
  a re-run is told what was emitted and continues after it;
- a request is held (no unit may take it now) or placed at one unit that is up;
- what a lost incarnation says is ignored.

Whose fault is a death? A worker names the requests in its steps before it submits them
(`Stepping`). When it dies, those named last are the suspects, or, if it never got so far, all that
it was given. One that was suspected more than `max_reruns` times in a row without a token in
between fails, and so does one that lost `max_reruns_total` workers all told. Requests that only
waited or were parked beside running ones are never suspects, and progress clears: a poisonous
request dies at the same place again and again, whereas one whose worker was killed from outside
moves on. It fails alone: the last run of a suspect is on probation, and no unit has two on
probation at once. The innocent ones of a deadly batch so get their token without the others and
are cleared.

Parked KV lies in its unit's own region of the host store. It is handed to that unit's next
incarnation in the very decision of its UnitUp, or never: a request that has some waits for its own
unit as long as that is being restarted; one that is placed elsewhere begins again from the journal.
"""

from collections.abc import Sequence

import msgspec

from weft.core.actions import Emit
from weft.core.errors import (
    DRAINING,
    HOLD_DEADLINE,
    MODEL_FAILED,
    MODEL_NOT_FOUND,
    QUEUE_FULL,
    REQUEST_FAILED,
    ReplyError,
    parse_error,
)
from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import FinishReason, Request
from weft.policy.dispatch.base import Dispatch, UnitLoad
from weft.pool import events as ev
from weft.pool.actions import (
    AssignTo,
    CancelAt,
    ModelGone,
    PoolAction,
    Reject,
    Reply,
    StartWorker,
    StopWorker,
    SubmitTo,
    UnassignFrom,
    UnloadAt,
    WakeAt,
    WarmAt,
)
from weft.pool.journal import Journal, Record
from weft.pool.shape import shape_error
from weft.pool.units import NS, Limits, Unit


class PoolScheduler:
    """Every model may run on every unit; which of them, the dispatch policy says."""

    def __init__(self, dispatch: Dispatch, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.units: dict[int, Unit] = {}
        self.journal = Journal()
        self.draining = False
        self._dispatch = dispatch
        self._models: dict[ModelName, ModelSpec] = {}
        self._ready: dict[ModelName, None] = {}
        self._failed: dict[ModelName, str] = {}
        self._retiring: dict[ModelName, None] = {}
        """Removed: what was admitted finishes, nothing more is."""
        self._wished: dict[ModelName, None] = {}
        """To be warmed on a unit as soon as one has it."""
        self._held: dict[RequestId, Record] = {}
        self._wake_ns: int | None = None
        self._now_ns = 0
        self._out: list[PoolAction] = []

    def handle(self, events: Sequence[ev.PoolEvent], now_ns: int) -> list[PoolAction]:
        self._now_ns = now_ns
        self._out = []
        for event in events:
            self._on(event)
        self._restart_units()
        self._stop_silent()
        self._place_held()
        self._expire_held()
        self._warm_wished()
        self._retire()
        self._set_wake()
        return self._out

    @property
    def held(self) -> int:
        """Requests that no unit has yet."""
        return len(self._held)

    def _on(self, event: ev.PoolEvent) -> None:
        match event:
            case ev.NewRequest(request=request):
                self._admit(request)
            case ev.ClientGone(request=request_id):
                self._client_gone(request_id)
            case ev.ModelAdded(spec=spec):
                self._models[spec.name] = spec
            case ev.ModelChanged(spec=spec):
                self._model_changed(spec)
            case ev.ModelRemoved(model=model):
                if model in self._models or model in self._failed:
                    self._retiring[model] = None
            case ev.WarmModel(model=model):
                self._wished[model] = None
            case ev.UnloadModel(model=model):
                self._wished.pop(model, None)
                self._unload(model)
            case ev.ModelReady(model=model):
                self._model_ready(model)
            case ev.ModelFailed(model=model, reason=reason):
                self._model_failed(model, reason)
            case ev.UnitAdded(unit=unit_id):
                if unit_id in self.units:
                    raise ValueError(f"unit {unit_id} was added twice")
                self.units[unit_id] = Unit(unit_id, restart_ns=self._now_ns)
            case ev.DrainPool():
                self.draining = True
            case ev.Woke():
                self._wake_ns = None
            case _:
                unit = self.units.get(event.unit)
                if unit is not None and unit.incarnation == event.incarnation:
                    self._on_unit(unit, event)

    def _on_unit(self, unit: Unit, event: ev.PoolEvent) -> None:
        """Something from the current incarnation of a unit. After its loss it is silent."""
        if unit.phase == "absent":
            return
        unit.heard_ns = self._now_ns
        match event:
            case ev.UnitUp():
                if unit.phase == "starting":
                    unit.phase = "up"
                    unit.down = False
                    for model in self._ready:
                        self._assign(unit, self._models[model])
            case ev.UnitLost(cause=cause):
                self._unit_lost(unit, cause)
            case ev.Unbound(model=model):
                unit.leaving.pop(model, None)
            case ev.Emitted(emit=emit):
                self._emitted(unit, emit)
            case ev.KvParkedAt(request=request_id, kv=kv):
                if record := self._placed(unit, request_id):
                    record.parked, record.parked_unit = kv, unit.id
                    unit.progress = True
            case ev.KvGoneAt(request=request_id):
                if record := self._placed(unit, request_id):
                    record.forget_parked()
            case ev.Stepping(requests=requests):
                unit.stepping = frozenset(requests)
            case ev.UnitReport(status=status):
                unit.status = status
                unit.progress = unit.progress or status.actions_done > 0

    # ------------------------------------------------------------------ requests

    def _admit(self, request: Request) -> None:
        error = self._refusal(request)
        if error is not None:
            self._out.append(Reject(request=request.id, error=error))
            return
        self._held[request.id] = self.journal.admit(request)

    def _refusal(self, request: Request) -> ReplyError | None:
        """Why the request cannot be admitted, or None."""
        for name in _needed(request):
            if name in self._failed:
                return ReplyError(code=MODEL_FAILED, message=self._failed[name])
            if name not in self._models or name in self._retiring:
                message = f"the model {name!r} does not exist"
                return ReplyError(code=MODEL_NOT_FOUND, message=message)
        if (error := shape_error(request, self._models[request.model])) is not None:
            return error
        if self.draining:
            return ReplyError(code=DRAINING, message="the server is shutting down")
        if self._hopeless():
            return ReplyError(code=MODEL_FAILED, message="no worker can be started")
        if len(self.journal) >= self.limits.max_queue:
            return ReplyError(
                code=QUEUE_FULL, message=f"{len(self.journal)} requests are unfinished; retry later"
            )
        most = self.limits.max_model_queue
        if most is None and len(self._models) > 1:
            most = max(1, self.limits.max_queue * 3 // 4)
        if most is not None and (here := self.journal.of_model(request.model)) >= most:
            message = f"{here} requests for {request.model!r} are unfinished; retry later"
            return ReplyError(code=QUEUE_FULL, message=message)
        return None

    def _client_gone(self, request_id: RequestId) -> None:
        record = self.journal.get(request_id)
        if record is None or record.gone:
            return
        if record.unit is None:
            self._finish(record, finish="cancelled")
            return
        record.gone = True
        unit = self.units[record.unit]
        self._out.append(CancelAt(unit=unit.id, incarnation=unit.incarnation, request=request_id))
        self._out.append(Reply(request=request_id, finish="cancelled"))

    def _placed(self, unit: Unit, request_id: RequestId) -> Record | None:
        """The record, if the request is unfinished and placed at this unit."""
        return self.journal.get(request_id) if request_id in unit.requests else None

    def _emitted(self, unit: Unit, emit: Emit) -> None:
        record = self._placed(unit, emit.request)
        if record is None:
            return
        if emit.tokens:
            unit.progress = True
            record.deaths_here = 0
            record.emitted.extend(emit.tokens)
        if emit.finish is not None:
            error = parse_error(emit.error) if emit.finish == "error" else None
            self._finish(record, finish=emit.finish, error=error, emit=emit)
        elif not record.gone:
            self._out.append(_reply(emit))

    def _finish(
        self,
        record: Record,
        *,
        finish: FinishReason,
        error: ReplyError | None = None,
        emit: Emit | None = None,
    ) -> None:
        """The request's one end. A client that left has had its last reply already."""
        if not record.gone:
            last = Reply(request=record.id) if emit is None else _reply(emit)
            self._out.append(msgspec.structs.replace(last, finish=finish, error=error))
        if record.unit is not None:
            self.units[record.unit].unplace(record.id, record.tokens)
        self._held.pop(record.id, None)
        self.journal.remove(record.id)

    # ------------------------------------------------------------------ models

    def _model_ready(self, model: ModelName) -> None:
        if model not in self._models or model in self._failed:
            return
        self._ready[model] = None
        for unit in self.units.values():
            if unit.up:
                self._assign(unit, self._models[model])

    def _units_with(self, model: ModelName) -> list[Unit]:
        return [unit for unit in self.units.values() if unit.up and model in unit.assigned]

    def _model_changed(self, spec: ModelSpec) -> None:
        if spec.name not in self._models:
            return
        self._models[spec.name] = spec
        for unit in self._units_with(spec.name):
            self._assign(unit, spec)

    def _unload(self, model: ModelName) -> None:
        for unit in self._units_with(model):
            self._out.append(UnloadAt(unit=unit.id, incarnation=unit.incarnation, model=model))

    def _warm_wished(self) -> None:
        """One unit a model: where it is already, else the one with the most room. A unit that has
        it is told, too: who wished waits for its next report."""
        for model in list(self._wished):
            if model in self._failed or model not in self._models:
                del self._wished[model]
            elif units := self._units_with(model):
                del self._wished[model]
                unit = max(units, key=lambda u: (u.resident(model), u.free_granules, -u.id))
                self._out.append(WarmAt(unit=unit.id, incarnation=unit.incarnation, model=model))

    def _retire(self) -> None:
        """Removed models leave the units after their last request, and are gone when no unit that
        had them reads their image any more."""
        for model in list(self._retiring):
            if any(model in _needed(record.request) for record in self.journal):
                continue
            for unit in self._units_with(model):
                self._unassign(unit, model)
            if not any(model in (*u.assigned, *u.leaving) for u in self.units.values()):
                for known in (self._retiring, self._models, self._ready, self._failed):
                    known.pop(model, None)
                self._out.append(ModelGone(model=model))

    def _unassign(self, unit: Unit, model: ModelName) -> None:
        del unit.assigned[model]
        unit.leaving[model] = None
        self._out.append(UnassignFrom(unit=unit.id, incarnation=unit.incarnation, model=model))

    def _assign(self, unit: Unit, spec: ModelSpec) -> None:
        unit.assigned[spec.name] = None
        unit.leaving.pop(spec.name, None)
        self._out.append(AssignTo(unit=unit.id, incarnation=unit.incarnation, model=spec))

    def _model_failed(self, model: ModelName, reason: str) -> None:
        self._ready.pop(model, None)
        self._failed[model] = reason
        for unit in self._units_with(model):
            self._unassign(unit, model)

    def _fail(self, record: Record, code: str, message: str) -> None:
        self._finish(record, finish="error", error=ReplyError(code=code, message=message))

    # ------------------------------------------------------------------ units

    def _hopeless(self) -> bool:
        """Every unit was declared down."""
        return bool(self.units) and all(unit.down for unit in self.units.values())

    def _unit_lost(self, unit: Unit, cause: str) -> None:
        unit.lose(self.limits, self._now_ns)
        for request_id in list(unit.requests):
            record = self.journal.get(request_id)
            assert record is not None, "placed requests are in the journal"
            if record.gone:
                self._finish(record, finish="cancelled")
                continue
            unit.unplace(request_id, record.tokens)
            record.unit = None
            self._held[request_id] = record
            if unit.suspected(request_id):
                self._suspect(record, cause)
        if unit.down:
            for record in self._held.values():
                if record.parked_unit == unit.id:
                    record.forget_parked()
            if self._hopeless():
                for record in list(self._held.values()):
                    self._fail(record, MODEL_FAILED, f"no worker can be started: {cause}")

    def _suspect(self, record: Record, cause: str) -> None:
        record.deaths += 1
        record.deaths_here += 1
        limits = self.limits
        if record.deaths_here > limits.max_reruns or record.deaths > limits.max_reruns_total:
            self._fail(
                record,
                REQUEST_FAILED,
                f"the worker died {record.deaths} times while it ran this request ({cause})",
            )

    def _restart_units(self) -> None:
        for unit in self.units.values():
            if unit.restart_ns is not None and unit.restart_ns <= self._now_ns:
                unit.begin()
                self._out.append(StartWorker(unit=unit.id, incarnation=unit.incarnation))

    def _silence_ns(self, unit: Unit) -> int | None:
        """When a unit with requests will have been silent for too long."""
        if unit.phase != "up" or not unit.requests:
            return None
        return unit.heard_ns + round(self.limits.silent_s * NS)

    def _stop_silent(self) -> None:
        for unit in self.units.values():
            limit_ns = self._silence_ns(unit)
            if limit_ns is not None and limit_ns <= self._now_ns:
                unit.phase = "stopping"
                self._out.append(StopWorker(unit=unit.id, incarnation=unit.incarnation))

    # ------------------------------------------------------------------ placing

    def _place_held(self) -> None:
        for record in sorted(self._held.values(), key=lambda r: r.id):
            broken = next((m for m in _needed(record.request) if m in self._failed), None)
            if broken is not None:
                self._fail(record, MODEL_FAILED, self._failed[broken])
            elif record.emitted and len(record.emitted) >= record.request.max_tokens:
                self._finish(record, finish="length")  # its last token came, its end did not
            elif (unit := self._unit_for(record)) is not None:
                self._place(record, unit)

    def _on_probation(self, record: Record) -> bool:
        """One more death fails it: nobody else under that suspicion runs beside it."""
        return 0 < record.deaths_here >= self.limits.max_reruns

    def _has_probation(self, unit: Unit) -> bool:
        return any(
            self._on_probation(record)
            for request_id in unit.requests
            if (record := self.journal.get(request_id)) is not None
        )

    def _unit_for(self, record: Record) -> Unit | None:
        model = record.request.model
        needed = set(_needed(record.request))
        takers = [u for u in self.units.values() if u.up and needed <= u.assigned.keys()]
        if record.parked_unit is not None:
            takers = [u for u in takers if u.id == record.parked_unit]
        if takers and self._on_probation(record):
            takers = [u for u in takers if not self._has_probation(u)]
            if not takers:
                record.forget_parked()  # it was to be handed over now or never
        if not takers:
            return None
        loads = [
            UnitLoad(
                unit=unit.id,
                requests=len(unit.requests),
                tokens=unit.tokens,
                resident=unit.resident(model),
                free_granules=unit.free_granules,
            )
            for unit in takers
        ]
        return self.units[self._dispatch.choose(record.request, loads)]

    def _place(self, record: Record, unit: Unit) -> None:
        del self._held[record.id]
        record.unit = unit.id
        unit.place(record.id, record.tokens, self._now_ns)
        self._out.append(
            SubmitTo(
                unit=unit.id,
                incarnation=unit.incarnation,
                request=record.to_submit(),
                emitted=tuple(record.emitted),
                resume=record.parked,
            )
        )

    def _begin_by_ns(self, record: Record) -> int | None:
        """Until when a held request must have begun; None once it has, in its client's eyes."""
        return None if record.emitted else record.request.hold_deadline_ns

    def _expire_held(self) -> None:
        for record in list(self._held.values()):
            deadline_ns = self._begin_by_ns(record)
            if deadline_ns is not None and deadline_ns <= self._now_ns:
                self._fail(record, HOLD_DEADLINE, "no unit could take the request in time")

    def _set_wake(self) -> None:
        """Ask for the next wake; one that turns out too early does no harm."""
        times = [self._begin_by_ns(record) for record in self._held.values()]
        times += [unit.restart_ns for unit in self.units.values()]
        times += [self._silence_ns(unit) for unit in self.units.values()]
        wake_ns = min((t for t in times if t is not None), default=None)
        if wake_ns is not None and (self._wake_ns is None or wake_ns < self._wake_ns):
            self._wake_ns = wake_ns
            self._out.append(WakeAt(at_ns=wake_ns))


def _needed(request: Request) -> tuple[ModelName, ...]:
    """What must be served, and assigned to a unit that runs it: the model, and its adapter."""
    return (request.model,) if request.adapter is None else (request.model, request.adapter)


def _reply(emit: Emit) -> Reply:
    """What a unit says of a request, for its client; the end is the scheduler's to say."""
    return Reply(
        request=emit.request,
        tokens=emit.tokens,
        logprobs=emit.logprobs,
        prompt_logprobs=emit.prompt_logprobs,
        embedding=emit.embedding,
        cached_tokens=emit.cached_tokens,
    )

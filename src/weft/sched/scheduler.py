"""The unit's scheduler: told what happened, answers with what to do. No clock, thread or I/O.

One decision runs in a fixed order: apply events, release what is idle, pass the turn, move memory
(current model first, then the next one), fill the lane. It repeats while one part's answer gives
another part something to do.
"""

import heapq
from collections.abc import Sequence

import msgspec

from weft.core.actions import Emit, KvGone, Status, UnitAction, UnitNotice, WakeAt
from weft.core.errors import CONTEXT_LENGTH, DRAINING, HOLD_DEADLINE, MODEL_FAILED, MODEL_NOT_FOUND
from weft.core.events import (
    Assign,
    BindFailed,
    Cancel,
    CopyDone,
    Done,
    Drain,
    Failed,
    Pin,
    ReportStatus,
    StepDone,
    Submit,
    Unassign,
    UnitEvent,
    Unload,
    Warm,
    Woke,
)
from weft.core.ids import ActionId, ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import Extent, Request
from weft.core.unit import ModelStatus, UnitSpec, UnitStatus
from weft.policy.presets import Preset
from weft.sched import adapters
from weft.sched.book import Book, ModelEntry, RequestState
from weft.sched.check import check_book
from weft.sched.moves import Mover
from weft.sched.prefix import PrefixCache
from weft.sched.steps import Stepper
from weft.sched.turns import Turns
from weft.sched.wishes import Wishes

MAX_ROUNDS = 8
"""Rounds of one decision; each makes progress, so this is a guard that is hardly ever met."""


class UnitScheduler:
    """Decides for one unit. `handle` must be called with non-decreasing times."""

    def __init__(self, unit: UnitSpec, preset: Preset) -> None:
        self._book = Book(unit)
        self._preset = preset
        self._prefixes = PrefixCache(self._book)
        self._mover = Mover(self._book, preset, self._prefixes)
        self._stepper = Stepper(self._book, self._mover, preset, self._prefixes)
        self._wishes = Wishes(self._book, self._mover, preset)
        self._turns = Turns(self._book, preset)
        self._deadlines: list[tuple[int, RequestId]] = []
        self._woken_for: int | None = None
        self._rushed = False

    def handle(self, events: Sequence[UnitEvent], now_ns: int) -> list[UnitAction | UnitNotice]:
        """Apply all events of this instant, then decide once.

        Notices come first in the answer: they must be delivered before the actions start.
        """
        book = self._book
        assert now_ns >= book.now_ns, "time went backwards"
        book.now_ns = now_ns
        report = False
        for event in events:
            report |= isinstance(event, ReportStatus)
            self._apply(event)
        self._decide()
        self._wake()
        if report:
            book.notices.append(Status(status=self.status()))
        out: list[UnitAction | UnitNotice] = [*book.notices, *book.actions]
        book.notices, book.actions = [], []
        return out

    # -- events ---------------------------------------------------------------------------------

    def _apply(self, event: UnitEvent) -> None:
        match event:
            case StepDone():
                self._stepper.done(event)
                if event.last:
                    self._ended(event.action)
            case CopyDone(action=action, num_bytes=num_bytes):
                self._mover.done(action, num_bytes)
                self._ended(action)
            case Done(action=action):
                self._done(action)
            case Failed():
                self._failed(event)
            case Submit():
                self._submit(event)
            case Cancel(request=request):
                state = self._book.requests.get(request)
                if state is not None and state.phase != "finished":
                    self._book.finish(state, "cancelled")
            case Assign(model=model):
                self._assign(model)
            case Unassign(model=name):
                if name in self._book.models:
                    self._book.models[name].unassigned = True
            case Pin(model=name, pinned=pinned):
                if name in self._book.models:
                    self._pin(name, pinned)
            case Warm() | Unload() | BindFailed():
                if event.model in self._book.models:
                    self._wish(event)
            case Drain():
                self._book.draining = True
            case Woke():
                self._woken_for = None
            case ReportStatus():
                pass

    def _ended(self, action: ActionId) -> None:
        self._book.ledger.hazards.done(action)
        self._book.actions_done += 1

    def _done(self, action: ActionId) -> None:
        if action in self._book.interrupts:
            self._book.interrupts.remove(action)
            self._book.actions_done += 1
            return
        self._mover.done(action, 0)
        self._ended(action)

    def _failed(self, event: Failed) -> None:
        if event.action in self._book.interrupts:
            self._book.interrupts.remove(event.action)
            return
        if event.action in self._book.steps:
            self._stepper.failed(event)
        else:
            self._mover.failed(event)
        self._book.ledger.hazards.done(event.action)

    # -- models ---------------------------------------------------------------------------------

    def _assign(self, spec: ModelSpec) -> None:
        book = self._book
        entry = book.models.get(spec.name)
        if entry is None:
            book.ledger.add_model(spec)
            entry = book.models[spec.name] = ModelEntry(spec, unassigned=True)
            entry.wish = "preload" if spec.preload else None
        else:
            old = entry.spec
            same = (old.weight_bytes, old.page_bytes, old.page_tokens) == (
                spec.weight_bytes,
                spec.page_bytes,
                spec.page_tokens,
            )
            assert same, "a model of other sizes needs another name"
            entry.spec = spec
            book.ledger.add_model(spec)
        if entry.unassigned:
            book.generations += 1
            entry.generation = book.generations
        entry.failed, entry.load_fails, entry.map_fails = None, 0, 0
        entry.unfit, entry.unassigned, entry.retry_ns = False, False, None
        self._check_fit()

    def _wish(self, event: Warm | Unload | BindFailed) -> None:
        entry = self._book.models[event.model]
        match event:
            case Warm():
                self._mover.residents.warm(entry)
            case Unload():
                self._mover.residents.unload(entry)
            case BindFailed(reason=reason):
                entry.failed, entry.unfit = reason, False
                self._mover.fail_model(entry)

    def _check_fit(self) -> None:
        """After a model came, went or was pinned: which models, and which of their requests, have
        no room beside those that stay? Of two that stay the earlier one has the room."""
        for entry in self._book.models.values():
            if entry.unfit:
                entry.failed, entry.unfit = None, False
        staying: dict[ModelName, int] = {}
        for entry in sorted(self._book.models.values(), key=lambda e: not self._stays(e)):
            if entry.failed is not None:
                continue
            problem = self._cannot_hold(entry.spec, staying)
            if problem is not None:
                entry.failed, entry.unfit = problem, True
                self._mover.fail_model(entry)
            elif self._stays(entry):
                name = entry.spec.name
                staying[name] = self._book.memory(name).weight_granules
        for entry in self._book.models.values():
            for state in list(entry.members.values()):
                error = self._too_large(state.request)
                if error is not None:
                    self._book.finish(state, "error", error=error)

    def _cannot_hold(self, spec: ModelSpec, staying: dict[ModelName, int]) -> str | None:
        """Why this model can never run beside those that stay (their granules), or None."""
        unit, others = self._book.unit, sum(staying.values())
        memory = self._book.memory(spec.name)
        need = memory.weight_granules + memory.kv_granules_for(1)
        if spec.base in self._book.models and spec.base not in staying:
            need += self._book.memory(spec.base).weight_granules
        if need + others <= unit.num_granules:
            return None
        mib = unit.granule_bytes / (1 << 20)
        beside = f" beside {others * mib:.0f} MiB of models that stay" if others else ""
        return (
            f"{spec.name} needs {need * mib:.0f} MiB, the device has "
            f"{unit.num_granules * mib:.0f} MiB"
            f"{beside}; raise engine.device_memory or pin fewer models"
        )

    def _stays(self, entry: ModelEntry) -> bool:
        return entry.spec.pinned or not self._preset.residency.evicts

    def _pin(self, name: ModelName, pinned: bool) -> None:
        entry = self._book.models[name]
        entry.spec = msgspec.structs.replace(entry.spec, pinned=pinned)
        self._book.ledger.add_model(entry.spec)
        self._check_fit()

    # -- requests -------------------------------------------------------------------------------

    def _submit(self, event: Submit) -> None:
        request = event.request
        error = self._refusal(event)
        if error is not None:
            if event.resume is not None:
                self._book.notices.append(KvGone(request=request.id))
            self._book.notices.append(
                Emit(request=request.id, tokens=(), finish="error", error=error)
            )
            return
        entry = self._book.models[request.model]
        eos = () if request.ignore_eos else entry.spec.eos_ids
        state = RequestState(request, list(event.emitted), tuple({*eos, *request.stop_ids}))
        self._book.requests[request.id] = state
        entry.members[request.id] = state
        if request.adapter is not None:
            self._book.models[request.adapter].riders[request.id] = state
        for name in (request.model, request.adapter):
            if name is not None:
                self._book.models[name].idle_since_ns = None
        if event.emitted:
            state.began = state.spoke = True
        if event.emitted and len(state.emitted) >= request.max_tokens:
            # Everything was sent already; only the end got lost with the worker.
            self._book.finish(state, "length")
            return
        if event.resume is not None:
            usable = event.resume.tokens and not (request.whole_prompt and not state.spoke)
            if usable and self._book.ledger.extents.reserve(event.resume.extents):
                state.parked, state.phase = event.resume, "parked"
                state.computed = state.planned = min(event.resume.tokens, state.known - 1)
                state.began = True
            else:
                self._book.notices.append(KvGone(request=request.id))
        if request.hold_deadline_ns is not None and not state.began:
            heapq.heappush(self._deadlines, (request.hold_deadline_ns, request.id))

    def _refusal(self, event: Submit) -> str | None:
        request = event.request
        entry = self._book.models.get(request.model)
        assert request.id not in self._book.requests, "a request id came twice"
        if entry is None or entry.unassigned:
            return f"{MODEL_NOT_FOUND}: the model {request.model!r} is not served here"
        self._try_again(entry)
        if entry.failed is not None:
            return f"{MODEL_FAILED}: {entry.failed}"
        if request.adapter is not None and (error := self._adapter_refusal(request)) is not None:
            return error
        if self._book.draining:
            return f"{DRAINING}: the server is shutting down; try again"
        total = len(request.prompt) + request.max_tokens
        limit = entry.spec.max_context_tokens
        if total > limit or not request.prompt:
            return (
                f"{CONTEXT_LENGTH}: {len(request.prompt)} prompt tokens and {request.max_tokens} "
                f"output tokens; the model's context is {limit}"
            )
        return self._too_large(request)

    def _adapter_refusal(self, request: Request) -> str | None:
        entry = self._book.models.get(request.adapter) if request.adapter is not None else None
        if entry is None or entry.unassigned or entry.spec.base != request.model:
            return f"{MODEL_NOT_FOUND}: the adapter {request.adapter!r} is not served here"
        self._try_again(entry)
        return f"{MODEL_FAILED}: {entry.failed}" if entry.failed is not None else None

    def _try_again(self, entry: ModelEntry) -> None:
        """A model whose loads failed may be tried again after a while."""
        if entry.retry_ns is not None and self._book.now_ns >= entry.retry_ns:
            entry.failed, entry.retry_ns, entry.load_fails = None, None, 0
            self._check_fit()

    def _too_large(self, request: Request) -> str | None:
        """Why this request could never run to its end, alone with its model and adapter beside
        those that stay, or None."""
        memory = self._book.memory(request.model)
        adapter = 0
        if request.adapter in self._book.models:
            adapter = self._book.memory(request.adapter).weight_granules
        others = sum(
            self._book.memory(name).weight_granules
            for name, other in self._book.models.items()
            if name not in (request.model, request.adapter)
            and not other.failed
            and self._stays(other)
        )
        room = self._book.unit.num_granules - others - memory.weight_granules - adapter
        total = len(request.prompt) + request.max_tokens
        # One page more than the tokens: whoever is admitted can always grow by one.
        need = memory.kv_granules_for(total + memory.spec.page_tokens)
        if need <= room:
            return None
        mib = self._book.unit.granule_bytes / (1 << 20)
        return (
            f"{CONTEXT_LENGTH}: {total} tokens need {need * mib:.0f} MiB of KV cache, the "
            f"device has room for {max(room, 0) * mib:.0f} MiB beside this model's weights"
        )

    def _check_deadlines(self) -> None:
        now = self._book.now_ns
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request = heapq.heappop(self._deadlines)
            state = self._book.requests.get(request)
            if state is not None and state.phase != "finished" and not state.began:
                error = f"{HOLD_DEADLINE}: the request waited too long for its model; try again"
                self._book.finish(state, "error", error=error)

    # -- the decision ---------------------------------------------------------------------------

    def _decide(self) -> None:
        self._check_deadlines()
        for _ in range(MAX_ROUNDS):
            before = self._progress()
            passed = self._round()
            if not passed and self._progress() == before:
                break
        else:
            # More to decide than one decision should take: go on in the next instant.
            self._rushed = True
        self._forget_unassigned()

    def _progress(self) -> tuple[int, int, int]:
        book = self._book
        return len(book.actions), len(book.notices), book.changes

    def _round(self) -> bool:
        """True if the turn has passed."""
        book, turns = self._book, self._turns
        self._mover.settle_maps()
        book.reap()
        turns.choose_next()
        passed = turns.try_pass()
        self._move()
        current = self._entry(turns.current)
        # When time is up and the next model is still on its way, the lane is not left idle.
        if current is not None and self._stepper.fill(current, turns.next, over=turns.expired):
            turns.step_planned()
        if (turns.over and turns.next is not None) or self._newcomers(current):
            self._stepper.interrupt()
        return passed

    def _entry(self, name: ModelName | None) -> ModelEntry | None:
        return self._book.models.get(name) if name is not None else None

    def _newcomers(self, current: ModelEntry | None) -> bool:
        """A repeated run is in flight, but its model's batch has changed since."""
        steps = self._book.steps.values()
        if current is None or not any(s.run.plan.repeat > 1 and not s.interrupted for s in steps):
            return False
        in_steps = {s.id for step in steps for s in step.states}
        return any(request not in in_steps for request in current.members) or any(
            s.phase == "finished" for step in steps for s in step.states
        )

    def _move(self) -> None:
        """Memory for the model with the turn, then for the next one, then for preloads."""
        mover, turns = self._mover, self._turns
        mover.look_again()
        current, upcoming = self._entry(turns.current), self._entry(turns.next)
        if current is not None and current.members and not turns.expired:
            alone = {current.spec.name}
            mover.bring_in(current, alone)
            mover.admit(current, first=alone, further={*alone, turns.next or current.spec.name})
        holder = current if not turns.over else None
        wanting = holder is not None and self._wants_room(holder)
        if upcoming is not None and not wanting:
            keep = {upcoming.spec.name}
            if holder is not None:
                keep.add(holder.spec.name)
            mover.bring_in(upcoming, keep)
            mover.admit(upcoming, first=keep, further=None)
        if not wanting and not (upcoming is not None and self._wants_room(upcoming)):
            self._wishes.follow()
        mover.continue_leaving()
        self._wishes.preload()
        self._prefixes.save()

    def _wants_room(self, entry: ModelEntry) -> bool:
        """The model with the turn waits for memory: what comes free is its."""
        absent = self._book.memory(entry.spec.name).state == "absent"
        return absent or entry.starving or entry.blocked

    def _forget_unassigned(self) -> None:
        gone = [item for item in self._book.models.items() if item[1].unassigned]
        for name, entry in gone:
            if adapters.used(entry):
                continue
            memory = self._book.memory(name)
            requests = (s.request for s in self._book.requests.values())
            holds = any(name in (request.model, request.adapter) for request in requests)
            if memory.state == "absent" and not memory.kv.granules and not holds:
                del self._book.models[name]
                self._book.ledger.remove_model(name)
                self._check_fit()

    def _wake(self) -> None:
        """Ask to be woken when a deadline or the end of a turn is the next thing to happen."""
        times: list[int] = []
        if self._rushed:
            self._rushed = False
            times.append(self._book.now_ns + 1)
        while self._deadlines and self._deadlines[0][1] not in self._book.requests:
            heapq.heappop(self._deadlines)
        if self._deadlines:
            times.append(self._deadlines[0][0])
        end = self._turns.end_ns()
        if end is not None and self._turns.next is not None and end > self._book.now_ns:
            times.append(end)
        leaves_ns = self._mover.residents.next_ns()
        if leaves_ns is not None:
            times.append(leaves_ns)
        if times and (self._woken_for is None or min(times) < self._woken_for):
            self._woken_for = min(times)
            self._book.notices.append(WakeAt(at_ns=self._woken_for))

    # -- reports --------------------------------------------------------------------------------

    def status(self) -> UnitStatus:
        book = self._book
        return UnitStatus(
            at_ns=book.now_ns,
            models=tuple(self._model_status(entry) for entry in book.models.values()),
            free_granules=book.ledger.free_granules,
            num_granules=book.unit.num_granules,
            host_used_bytes=book.ledger.extents.num_bytes
            - book.ledger.extents.free_bytes
            - book.ledger.shelf.held_bytes,
            host_bytes=book.unit.host_bytes,
            host_cached_bytes=book.ledger.shelf.held_bytes,
            actions_done=book.actions_done,
            bytes_copied=book.bytes_copied,
            waiting=sum(len(entry.members) for entry in book.models.values()),
        )

    def _model_status(self, entry: ModelEntry) -> ModelStatus:
        # A request of an adapter counts there, not at its base: sums over all are right.
        name = entry.spec.name
        states = adapters.users(entry)
        memory = self._book.memory(name)
        phases = [s.phase for s in states if (s.request.adapter or name) == name]
        return ModelStatus(
            name=name,
            state="failed" if entry.failed else memory.state,
            weight_granules=len(memory.weights),
            kv_granules=len(memory.kv.granules),
            kv_pages_used=len(memory.kv.live),
            queued=phases.count("queued"),
            running=phases.count("running"),
            parked=sum(p in ("parked", "parking", "resuming") for p in phases),
            turn=self._turns.current == name,
            switches_in=entry.switches_in,
            switches_out=entry.switches_out,
            prompt_tokens=entry.prompt_tokens,
            output_tokens=entry.output_tokens,
            prefix_hit_tokens=entry.prefix_hit_tokens,
            kv_pages_cached=len(memory.kv.cached),
            host_pages_cached=memory.kv.index.num_hosted,
            reason=entry.failed,
            loads_by=dict(entry.loads_by),
            drops_by=dict(entry.drops_by),
            load_ns=entry.load_ns,
            load_bytes=entry.load_bytes,
            begun=entry.begun,
            queue_wait_ns=entry.queue_wait_ns,
            preemptions=entry.preemptions,
            parks=entry.parks,
        )

    @property
    def idle(self) -> bool:
        """Nothing in flight and nobody waiting: both sides of the ledger can be compared."""
        book = self._book
        return not book.requests and not book.steps and not book.moves and not book.interrupts

    def unused_host(self) -> tuple[Extent, ...]:
        """The region for parked KV without what lies in it."""
        return self._book.ledger.extents.free()

    def mapped(self) -> dict[str, tuple[int, ...]]:
        """What should lie under each virtual range, for Executor.check_integrity when idle."""
        return self._book.ledger.mapped()

    def check_integrity(self) -> None:
        """The ledger's own check, and that requests hold exactly what it says. Raises
        AssertionError."""
        check_book(self._book)

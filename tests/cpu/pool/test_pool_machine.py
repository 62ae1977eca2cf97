"""The pool's laws under any history of clients, units, deaths and stale messages.

The machine plays clients and units. A unit's answer to request r is answer(r, 0), answer(r, 1), ...
whatever incarnation gives it, as promise 3 has it; so every client must see a prefix of exactly
that, once. A unit's host region holds parked KV; what a new incarnation was not handed in its first
instant is overwritten then, and a later resume from it would be a corrupted answer.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from support.pool_cases import kv, request, spec, status
from weft.core.actions import Emit
from weft.core.ids import ModelName, RequestId
from weft.core.request import ParkedKv
from weft.policy.dispatch.least_loaded import LeastLoaded
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
from weft.pool.scheduler import PoolScheduler
from weft.pool.units import NS, Limits

MODELS = ("a", "b")
UNITS = (0, 1)


def answer(request_id: int, index: int) -> int:
    return (request_id * 31 + index * 7) % 1000


@dataclass
class FakeUnit:
    """A worker as the pool sees it, and the host region that outlives it."""

    incarnation: int = 0
    alive: bool = False
    up: bool = False
    assigned: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    """Unassigned, not forgotten."""
    done: dict[int, int] = field(default_factory=dict)
    """Requests here: how many tokens they have."""
    host: dict[int, ParkedKv] = field(default_factory=dict)
    stepping: tuple[int, ...] = ()


@dataclass
class Client:
    model: str
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    end: str | None = None
    left: bool = False


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.limits = Limits(
            max_queue=6, max_reruns=1, max_reruns_total=3, max_failures=2, silent_s=20.0
        )
        self.brain = PoolScheduler(LeastLoaded(), self.limits)
        self.now_ns = 0
        self.wake_ns: int | None = None
        self.units = {unit: FakeUnit() for unit in UNITS}
        self.clients: dict[int, Client] = {}
        self.rejected: set[int] = set()
        self.failed: set[str] = set()
        self.removed: set[str] = set()
        self.gone: set[str] = set()
        """Gone for good: a model that is added again has another name in here."""
        self.last_id = 0
        self.parks = 0
        self.tell(
            *(ev.ModelAdded(spec=spec(name)) for name in MODELS),
            *(ev.UnitAdded(unit=unit) for unit in UNITS),
        )

    # ---------------------------------------------------------------- carrying out actions

    def tell(self, *events: ev.PoolEvent) -> None:
        self.rejected.clear()
        actions = self.brain.handle(events, self.now_ns)
        for action in actions:
            self.carry_out(action)
        for event in events:
            if isinstance(event, ev.UnitUp):
                unit = self.units[event.unit]
                if unit.up and event.incarnation == unit.incarnation:
                    unit.host = {r: k for r, k in unit.host.items() if r in unit.done}

    def carry_out(self, action: PoolAction) -> None:
        match action:
            case Reply():
                self.reply(action)
            case Reject(request=request_id):
                self.rejected.add(request_id)
                del self.clients[request_id]
            case WakeAt(at_ns=at_ns):
                self.wake_ns = at_ns
            case StartWorker():
                unit = self.units[action.unit]
                assert not unit.alive and action.incarnation == unit.incarnation + 1
                unit.incarnation, unit.alive = action.incarnation, True
            case StopWorker():
                assert action.incarnation == self.units[action.unit].incarnation
            case ModelGone(model=model):
                assert model in self.removed, "nobody removed it"
                assert all(c.end or c.left or c.model != model for c in self.clients.values())
                for unit in self.units.values():
                    assert model not in unit.assigned | unit.leaving, "its image is still read"
                self.removed.discard(model)
                self.gone.add(model)
            case SubmitTo() | CancelAt() | AssignTo() | UnassignFrom() | WarmAt() | UnloadAt():
                unit = self.units[action.unit]
                assert unit.up and action.incarnation == unit.incarnation
                self.to_unit(unit, action)

    def to_unit(
        self,
        unit: FakeUnit,
        action: SubmitTo | CancelAt | AssignTo | UnassignFrom | WarmAt | UnloadAt,
    ) -> None:
        match action:
            case SubmitTo(request=req, emitted=emitted, resume=resume):
                assert req.model in unit.assigned and req.id not in unit.done
                assert all(req.id not in other.done for other in self.units.values())
                assert list(emitted) == self.clients[req.id].tokens, "a seam"
                assert len(emitted) < req.max_tokens
                assert resume is None or unit.host.get(req.id) == resume, "KV that is not there"
                unit.done[req.id] = len(emitted)
            case CancelAt(request=request_id):
                assert request_id in unit.done
            case AssignTo(model=model):
                unit.assigned.add(model.name)
                unit.leaving.discard(model.name)
                assert model.name not in self.gone
            case UnassignFrom(model=name):
                unit.assigned.remove(name)
                unit.leaving.add(name)
            case WarmAt(model=name) | UnloadAt(model=name):
                assert name in unit.assigned

    def reply(self, reply: Reply) -> None:
        client = self.clients[reply.request]
        assert client.end is None, "something after the end"
        for token in reply.tokens:
            assert token == answer(reply.request, len(client.tokens)), "not the plain answer"
            client.tokens.append(token)
        assert len(client.tokens) <= client.max_tokens
        if reply.finish is not None:
            client.end = reply.finish
            assert (reply.error is not None) == (reply.finish == "error")

    # ---------------------------------------------------------------- what happens

    @initialize(warm=st.booleans())
    def begin(self, warm: bool) -> None:
        if warm:
            for model in MODELS:
                self.an_image_is_ready(model)
            for unit in UNITS:
                self.a_worker_comes_up(unit)

    @rule(
        asks=st.lists(
            st.tuples(st.sampled_from("aaaabbx"), st.integers(1, 6)), min_size=1, max_size=3
        )
    )
    def clients_ask(self, asks: list[tuple[str, int]]) -> None:
        for model, max_tokens in asks:
            self.a_client_asks(model, max_tokens)

    def a_client_asks(self, model: str, max_tokens: int) -> None:
        self.last_id += 1
        self.clients[self.last_id] = Client(model, max_tokens)
        full = len(self.brain.journal) >= self.limits.max_queue
        deadline_ns = self.now_ns + 30 * NS
        new = request(self.last_id, model, max_tokens=max_tokens, hold_deadline_ns=deadline_ns)
        self.tell(ev.NewRequest(request=new))
        away = self.removed | self.gone | self.failed
        refuse = full or model in away or model == "x"
        if refuse:
            assert self.last_id in self.rejected

    @rule(data=st.data())
    @precondition(lambda self: self.clients)
    def a_client_leaves(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.clients)))
        client = self.clients[request_id]
        was_open = client.end is None
        self.tell(ev.ClientGone(request=RequestId(request_id)))
        assert client.end == "cancelled" if was_open else client.end is not None
        client.left = True

    @rule(model=st.sampled_from(MODELS))
    def an_image_is_ready(self, model: str) -> None:
        if model not in self.failed:  # it may be gone by then
            self.tell(ev.ModelReady(model=ModelName(model)))

    @rule(model=st.sampled_from(MODELS))
    @precondition(lambda self: self.last_id > 8)
    def a_model_is_removed(self, model: str) -> None:
        if model not in self.gone:
            self.removed.add(model)
            self.tell(ev.ModelRemoved(model=ModelName(model)))

    @rule(data=st.data())
    @precondition(lambda self: any(unit.leaving for unit in self.units.values()))
    def a_unit_forgets(self, data: st.DataObject) -> None:
        unit_id = data.draw(st.sampled_from([u for u, unit in self.units.items() if unit.leaving]))
        unit = self.units[unit_id]
        name = ModelName(data.draw(st.sampled_from(sorted(unit.leaving))))
        if any(self.clients[r].model == name for r in unit.done):
            return  # it has not finished what it has
        unit.leaving.discard(name)
        self.tell(ev.Unbound(unit=unit_id, incarnation=unit.incarnation, model=name))

    @rule(model=st.sampled_from(MODELS), what=st.sampled_from(["warm", "unload", "change"]))
    def an_operator_wishes(self, model: str, what: str) -> None:
        name = ModelName(model)
        match what:
            case "warm":
                self.tell(ev.WarmModel(model=name))
            case "unload":
                self.tell(ev.UnloadModel(model=name))
            case _:
                self.tell(ev.ModelChanged(spec=spec(model)))

    @rule(model=st.just("b"))
    @precondition(lambda self: self.last_id > 12)
    def a_model_fails(self, model: str) -> None:
        self.failed.add(model)
        self.tell(ev.ModelFailed(model=ModelName(model), reason="torn"))

    @rule(unit_id=st.sampled_from(UNITS))
    def a_worker_comes_up(self, unit_id: int) -> None:
        unit = self.units[unit_id]
        if unit.alive and not unit.up:
            unit.up = True
            self.tell(ev.UnitUp(unit=unit_id, incarnation=unit.incarnation))

    @rule(unit_id=st.sampled_from(UNITS), back=st.booleans())
    def a_worker_dies(self, unit_id: int, back: bool = False) -> None:
        unit = self.units[unit_id]
        if unit.alive:
            unit.alive = unit.up = False
            unit.done, unit.stepping = {}, ()
            unit.assigned, unit.leaving = set(), set()
            lost = ev.UnitLost(unit=unit_id, incarnation=unit.incarnation, cause="killed")
            self.tell(lost)
            if back:
                self.time_passes()
                self.a_worker_comes_up(unit_id)

    def pick(self, data: st.DataObject) -> tuple[int, FakeUnit, int]:
        """A unit and a request on it."""
        places = [(u, r) for u, unit in self.units.items() for r in sorted(unit.done)]
        unit_id, request_id = data.draw(st.sampled_from(places))
        return unit_id, self.units[unit_id], request_id

    def busy(self) -> bool:
        return any(unit.done for unit in self.units.values())

    @rule(data=st.data(), count=st.integers(1, 3), finish=st.booleans())
    @precondition(lambda self: self.busy())
    def a_unit_emits(self, data: st.DataObject, count: int, finish: bool) -> None:
        unit_id, unit, request_id = self.pick(data)
        client, done = self.clients[request_id], unit.done[request_id]
        count = min(count, client.max_tokens - done)
        tokens = tuple(answer(request_id, done + i) for i in range(count))
        unit.done[request_id] += count
        ended = finish and unit.done[request_id] == client.max_tokens
        stopped = client.left
        emit = Emit(
            request=RequestId(request_id),
            tokens=tokens,
            finish="cancelled" if stopped else "length" if ended else None,
        )
        if emit.finish is not None:
            del unit.done[request_id]
            unit.host.pop(request_id, None)
        self.tell(ev.Emitted(unit=unit_id, incarnation=unit.incarnation, emit=emit))

    @rule(data=st.data())
    @precondition(lambda self: self.busy())
    def a_unit_parks(self, data: st.DataObject) -> None:
        unit_id, unit, request_id = self.pick(data)
        self.parks += 1
        where = unit.host[request_id] = kv(tokens=1 + self.parks, offset=4096 * self.parks)
        self.tell(
            ev.KvParkedAt(
                unit=unit_id,
                incarnation=unit.incarnation,
                request=RequestId(request_id),
                kv=where,
            )
        )

    def parked_somewhere(self) -> list[tuple[int, int]]:
        return [(u, r) for u, unit in self.units.items() for r in unit.host if r in unit.done]

    @rule(data=st.data(), then_dies=st.booleans())
    @precondition(lambda self: self.parked_somewhere())
    def a_unit_gives_parked_kv_away(self, data: st.DataObject, then_dies: bool) -> None:
        unit_id, request_id = data.draw(st.sampled_from(self.parked_somewhere()))
        unit = self.units[unit_id]
        del unit.host[request_id]
        self.tell(
            ev.KvGoneAt(unit=unit_id, incarnation=unit.incarnation, request=RequestId(request_id))
        )
        if then_dies:
            self.a_worker_dies(unit_id, back=True)

    @rule(data=st.data())
    @precondition(lambda self: self.busy())
    def a_unit_steps(self, data: st.DataObject) -> None:
        unit_id, unit, _ = self.pick(data)
        chosen = data.draw(st.sets(st.sampled_from(sorted(unit.done)), min_size=1))
        unit.stepping = tuple(RequestId(r) for r in sorted(chosen))
        self.tell(ev.Stepping(unit=unit_id, incarnation=unit.incarnation, requests=unit.stepping))

    @rule(unit_id=st.sampled_from(UNITS), done=st.integers(0, 2))
    def a_unit_reports(self, unit_id: int, done: int) -> None:
        unit = self.units[unit_id]
        if unit.up:
            report = status(actions_done=done)
            self.tell(ev.UnitReport(unit=unit_id, incarnation=unit.incarnation, status=report))

    @rule(unit_id=st.sampled_from(UNITS), back=st.integers(0, 2), data=st.data())
    @precondition(lambda self: self.clients)
    def stale_words(self, unit_id: int, back: int, data: st.DataObject) -> None:
        """Of an incarnation that is dead, or of the current one after its death."""
        unit = self.units[unit_id]
        incarnation = unit.incarnation - back if not unit.alive else unit.incarnation - 1 - back
        request_id = RequestId(data.draw(st.sampled_from(sorted(self.clients))))
        emit = Emit(request=request_id, tokens=(999,), finish="stop")
        who = {"unit": unit_id, "incarnation": incarnation}
        self.tell(
            ev.Emitted(**who, emit=emit),
            ev.KvParkedAt(**who, request=request_id, kv=kv(tokens=99)),
            ev.KvGoneAt(**who, request=request_id),
            ev.Stepping(**who, requests=(request_id,)),
            ev.UnitReport(**who, status=status(actions_done=5)),
            ev.UnitUp(**who),
            ev.Unbound(**who, model=ModelName("a")),
            ev.UnitLost(**who, cause="again"),
        )

    @rule()
    def time_passes(self) -> None:
        if self.wake_ns is not None:
            self.now_ns = max(self.now_ns, self.wake_ns)
            self.wake_ns = None
            self.tell(ev.Woke())

    # ---------------------------------------------------------------- what always holds

    @invariant()
    def no_request_is_lost(self) -> None:
        open_ids = {i for i, client in self.clients.items() if client.end is None}
        on_units = {r for unit in self.units.values() for r in unit.done}
        assert {r.id for r in self.brain.journal} >= open_ids
        assert len(self.brain.journal) == self.brain.held + sum(
            len(unit.done) for unit in self.units.values()
        )
        assert self.brain.held >= len(open_ids - on_units)

    @invariant()
    def the_accounts_are_right(self) -> None:
        for unit_id, fake in self.units.items():
            unit = self.brain.units[unit_id]
            assert set(unit.requests) == set(fake.done)
            records = [self.brain.journal.get(r) for r in unit.requests]
            assert unit.tokens == sum(r.tokens for r in records if r is not None)

    @invariant()
    def probation_is_alone(self) -> None:
        for unit in self.brain.units.values():
            records = [self.brain.journal.get(r) for r in unit.requests]
            suspects = [r for r in records if r is not None and r.deaths_here]
            assert sum(r.deaths_here >= self.limits.max_reruns for r in suspects) <= 1

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """A held request has something that will end its wait: a worker or an image on its way, a
        restart or a deadline."""
        starting = any(unit.alive and not unit.up for unit in self.units.values())
        assert not self.brain.held or starting or self.wake_ns is not None

    def teardown(self) -> None:
        """Let the world calm down: every request then comes to its end."""
        for model in MODELS:
            self.an_image_is_ready(model)
        for _ in range(200):
            if not len(self.brain.journal):
                break
            for unit_id, unit in self.units.items():
                self.a_worker_comes_up(unit_id)
                for request_id in sorted(unit.done):
                    done, client = unit.done.pop(request_id), self.clients[request_id]
                    tokens = tuple(answer(request_id, i) for i in range(done, client.max_tokens))
                    emit = Emit(request=RequestId(request_id), tokens=tokens, finish="length")
                    self.tell(ev.Emitted(unit=unit_id, incarnation=unit.incarnation, emit=emit))
            self.time_passes()
        for unit_id, unit in self.units.items():
            if self.brain.units[unit_id].phase == "stopping":
                self.a_worker_dies(unit_id)
            for name in sorted(unit.leaving):
                unit.leaving.discard(name)
                self.tell(
                    ev.Unbound(unit=unit_id, incarnation=unit.incarnation, model=ModelName(name))
                )
        assert not self.removed, "removed and never gone"
        for client in self.clients.values():
            assert client.end is not None, "a request that never ended"
            if client.end == "length":
                assert len(client.tokens) == client.max_tokens


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)

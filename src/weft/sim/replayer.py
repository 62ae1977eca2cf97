"""Promise 2: the same sequence of step plans gives the same bits, whatever happens in between.

A `PlanReplayer` repeats the steps of a plan log (same models, same rows in the same order at the
same positions) with its own memory and with disturbances drawn from a seed: requests are parked and
resumed at other pages, extents and slots, weights dropped and loaded again at other granules, KV
remapped, foreign steps run in between.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from random import Random

import msgspec

from weft.core.actions import Row, StepPlan, UnitAction, finishes
from weft.core.events import CopyDone, Done, Failed, StepDone, UnitEvent
from weft.core.ids import ActionId, RequestId, SlotId
from weft.core.model import ModelSpec
from weft.core.request import Sampling
from weft.core.unit import UnitSpec
from weft.sim.plan_record import RecordedStep
from weft.sim.replay_mover import Held, Mover, ReplayError

NOISE_REQUESTS = 1 << 48
"""Requests with ids from here on are the replayer's own, in no record."""


class Disturbances(msgspec.Struct, frozen=True, kw_only=True):
    """Chance of each, before every step. All zero: the steps alone."""

    park: float = 0.3
    resume: float = 0.2
    reslot: float = 0.2
    drop: float = 0.2
    remap: float = 0.3
    noise: float = 0.3
    follow: float = 0.5
    """That a step follows the load of its model in flight, layer by layer."""
    split: float = 0.5
    """That a repeated step is run as single ones."""


CALM = Disturbances(
    park=0.0, resume=0.0, reslot=0.0, drop=0.0, remap=0.0, noise=0.0, follow=0.0, split=0.0
)


class PlanReplayer:
    """Drive it like a scheduler: `handle(events)` returns the next actions, until `done`.

    At most `unit.depth` steps are in flight. Raises ReplayError.
    """

    def __init__(
        self,
        unit: UnitSpec,
        models: Iterable[ModelSpec],
        record: Sequence[RecordedStep],
        *,
        seed: int = 0,
        disturbances: Disturbances | None = None,
        first_id: int = 1,
    ) -> None:
        self._rng = Random(seed)
        self._chance = disturbances or Disturbances()
        self._mover = Mover(unit, models, self._rng, first_id)
        self._record = record
        self._depth = unit.depth
        self._last_use = {row.request: i for i, step in enumerate(record) for row in step.plan.rows}
        self._todo: deque[tuple[int, int, int]] = deque(
            (i, 0, len(step.tokens)) for i, step in enumerate(record) if step.tokens
        )
        """(step, first iteration, iterations)."""
        self._next_noise = NOISE_REQUESTS
        self._runs: dict[ActionId, tuple[int, int] | None] = {}
        """Steps in flight: (step, first iteration) in the record, None for noise."""
        self._cleaned = False
        self.drawn: dict[tuple[int, int], tuple[int, ...]] = {}
        """What (step, iteration) drew in the replay."""

    # -- driving --------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Every step has run, everything is unmapped and no action is in flight."""
        return self._cleaned and not self._mover.in_flight

    @property
    def counts(self) -> dict[str, int]:
        """Disturbances made, by kind: so that a test sees that it tested."""
        return self._mover.counts

    def mapped(self) -> dict[str, tuple[int, ...]]:
        """For Executor.check_integrity."""
        return self._mover.memory.mapped()

    def handle(self, events: Iterable[UnitEvent]) -> list[UnitAction]:
        for event in events:
            self._take(event)
        while self._todo and len(self._runs) < self._depth:
            if self._rng.random() < self._chance.noise:
                self._noise()
            else:
                self._next_step()
        if not self._todo and not self._cleaned:
            self._clean_up()
        out, self._mover.out = self._mover.out, []
        return out

    def mismatches(self) -> list[str]:
        """Iterations whose tokens differ from the record."""
        return [
            f"step {i}, iteration {k}: {tokens} became {self.drawn.get((i, k))}"
            for i, step in enumerate(self._record)
            for k, tokens in enumerate(step.tokens)
            if self.drawn.get((i, k)) != tokens
        ]

    def _take(self, event: UnitEvent) -> None:
        if isinstance(event, Failed):
            raise ReplayError(f"action {event.action} failed: {event.cause}")
        if not isinstance(event, StepDone | CopyDone | Done):
            return
        if isinstance(event, StepDone):
            self._take_tokens(event)
            if not event.last:
                return
            del self._runs[event.action]
        self._mover.ended(event.action)

    def _take_tokens(self, event: StepDone) -> None:
        place = self._runs[event.action]
        if place is None:
            return
        index, first = place
        for k, tokens in enumerate(event.tokens):
            self.drawn[index, first + k] = tokens
        self._runs[event.action] = (index, first + len(event.tokens))

    # -- planning -------------------------------------------------------------------------------

    def _next_step(self) -> None:
        self._disturb()
        index, first, count = self._todo.popleft()
        step = self._record[index]
        if count > 1 and self._must_split(step, first, count):
            self._todo.extendleft((index, first + k, 1) for k in reversed(range(count)))
            index, first, count = self._todo.popleft()
        rows = step.plan.rows
        held = [self._mover.hold(row.request, step.plan.model) for row in rows]
        ends = [row.start + row.num_tokens + first + count - 1 for row in rows]
        adapters = sorted({row.adapter for row in rows if row.adapter is not None})
        for row, h in zip(rows, held, strict=True):
            if row.start + first > h.tokens:
                raise ReplayError(
                    f"request {row.request} begins behind KV that it did not compute: record with "
                    "engine.prefix_cache: false"
                )
        follow = self._follow(self._mover.prepare(step.plan.model, held, ends, adapters))
        plan = StepPlan(
            model=step.plan.model,
            rows=tuple(self._row(row, h, first) for row, h in zip(rows, held, strict=True)),
            repeat=count,
        )
        drawn = step.tokens[first + count - 1]
        for row, h, end, token in zip(rows, held, ends, drawn, strict=True):
            h.tokens = end
            h.on_device = row.sample is not None
            h.last_token = token if row.sample is not None else None
        self._runs[self._mover.run(plan, held, follow)] = (index, first)
        if first + count == len(step.tokens):
            for h in held:
                if self._last_use[h.request] == index:
                    self._mover.let_go(h)

    def _must_split(self, step: RecordedStep, first: int, count: int) -> bool:
        """Also where an iteration before the last drew a stop id: it was launched ahead."""
        early = any(
            finishes(step.plan, first + k, step.tokens[first + k]) for k in range(count - 1)
        )
        return early or self._rng.random() < self._chance.split

    def _row(self, row: Row, held: Held, iteration: int) -> Row:
        """The recorded row at this iteration."""
        ids = row.input if iteration == 0 else None
        if ids is None and not held.on_device:
            if held.last_token is None:
                raise ReplayError(f"request {row.request} begins in the middle of the record")
            ids = (held.last_token,)
        moved = msgspec.structs.replace(
            row,
            start=row.start + iteration,
            output_index=row.output_index + iteration,
            min_remaining=max(0, row.min_remaining - iteration),
        )
        return _placed(moved, held, ids)

    # -- disturbances ---------------------------------------------------------------------------

    def _disturb(self) -> None:
        chance, rng = self._chance, self._rng
        if rng.random() < chance.park:
            self._disturb_park()
        if rng.random() < chance.resume:
            self._disturb_resume()
        if rng.random() < chance.reslot:
            slotted = [h for h in self._mover.held.values() if h.slot is not None]
            if slotted:
                self._mover.leave_slot(rng.choice(slotted))
                self._mover.count("reslot")
        if rng.random() < chance.drop:
            loaded = [name for name, p in self._mover.memory.models.items() if p.weights]
            if loaded:
                self._mover.drop(rng.choice(loaded))
        if rng.random() < chance.remap:
            self._disturb_map()

    def _disturb_park(self) -> None:
        here = [h for h in self._mover.held.values() if h.pages]
        if here:
            held = self._rng.choice(here)
            if len(held.pages) <= len(self._mover.memory.free_units):
                self._mover.park(held)

    def _disturb_resume(self) -> None:
        away = [h for h in self._mover.held.values() if h.units]
        if away:
            held = self._rng.choice(away)
            need = self._mover.memory.models[held.model].grow(len(held.units), self._rng)
            # Well below what is free: the places are drawn anew when the pages are taken.
            if need is not None and 2 * len(need) <= len(self._mover.memory.free_granules):
                self._mover.resume(held, {held.request})

    def _disturb_map(self) -> None:
        """Unmap everything empty of one model, or map something nobody asked for."""
        places = self._mover.memory.models[self._rng.choice(self._mover.bases)]
        empty = places.empty()
        if empty:
            self._mover.unmap(places, self._rng.sample(empty, self._rng.randint(1, len(empty))))
        elif self._mover.memory.free_granules:
            at = self._rng.randrange(self._mover.memory.unit.num_granules)
            if at not in places.mapped:
                self._mover.map(places, [at])

    def _noise(self) -> None:
        """A request of no record: prompt, perhaps a few tokens, gone."""
        rng, unit = self._rng, self._mover.memory.unit
        model = rng.choice(self._mover.bases)
        spec = self._mover.memory.models[model].spec
        held = self._mover.hold(RequestId(self._next_noise), model)
        self._next_noise += 1
        prompt = tuple(
            rng.randrange(spec.vocab_size)
            for _ in range(rng.randint(1, min(12, unit.max_step_tokens, spec.max_context_tokens)))
        )
        sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(1 << 30))
        first = Row(
            request=held.request,
            slot=SlotId(0),
            start=0,
            num_tokens=len(prompt),
            input=prompt,
            sample=sampling,
        )
        self._noise_step(held, first, 1)
        repeat = rng.randint(1, min(4, unit.max_repeat))
        room = len(prompt) + repeat <= spec.max_context_tokens
        if room and len(self._runs) < self._depth and rng.random() < 0.5:
            decode = msgspec.structs.replace(first, start=len(prompt), num_tokens=1, input=None)
            self._noise_step(held, decode, repeat)
        self._mover.let_go(held)
        self._mover.count("noise")

    def _noise_step(self, held: Held, row: Row, repeat: int) -> None:
        end = row.start + row.num_tokens + repeat - 1
        follow = self._follow(self._mover.prepare(held.model, [held], [end]))
        if row.input is None and not held.on_device:
            return  # it had to make room for itself: its last token is gone
        placed = _placed(row, held, row.input)
        held.on_device, held.tokens = True, end
        plan = StepPlan(model=held.model, rows=(placed,), repeat=repeat)
        self._runs[self._mover.run(plan, [held], follow)] = None

    def _follow(self, load: ActionId | None) -> ActionId | None:
        return load if self._rng.random() < self._chance.follow else None

    def _clean_up(self) -> None:
        for held in list(self._mover.held.values()):
            self._mover.let_go(held)
        for places in self._mover.memory.models.values():
            if places.mapped:
                self._mover.unmap(places, places.empty())
            if places.weights:
                self._mover.drop(places.spec.name)
        self._cleaned = True


def _placed(row: Row, held: Held, ids: tuple[int, ...] | None) -> Row:
    """With this replay's slot, and the pages its page table does not have yet."""
    assert held.slot is not None
    first_page, held.in_table = held.in_table, len(held.pages)
    return msgspec.structs.replace(
        row,
        slot=held.slot,
        input=ids,
        first_page=first_page,
        append_pages=tuple(held.pages[first_page:]),
    )

"""The replayer's hands: makes memory for its steps and plans the actions that do so.

Every action is ordered after whoever touches the same page, granule, slot or host piece, so what
one action frees the next may take at once.
"""

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, TypeVar

from weft.core.actions import CopyKv, Drop, Load, MapKv, Run, StepPlan, UnitAction, UnmapKv
from weft.core.ids import ActionId, ModelName, PageId, RequestId, SlotId
from weft.core.model import ModelSpec
from weft.core.request import Extent
from weft.core.unit import UnitSpec
from weft.ledger.hazards import Hazards, Resource
from weft.sim.replay_memory import ModelPlaces, ReplayMemory

_A = TypeVar("_A", bound=UnitAction)


class ReplayError(RuntimeError):
    """The replay cannot go on: an action failed, or the unit is too small for the record."""


class Held:
    """A request in the replay."""

    def __init__(self, request: RequestId, model: ModelName) -> None:
        self.request = request
        self.model = model
        self.pages: list[PageId] = []
        self.slot: SlotId | None = None
        self.in_table = 0
        """Pages already written to the slot's page table."""
        self.on_device = False
        """Whether the slot's last token is the request's."""
        self.last_token: int | None = None
        self.tokens = 0
        """Positions with KV."""
        self.units: list[int] = []
        """Host pieces while parked, one a page."""
        self.extents: tuple[Extent, ...] = ()
        """The same as extents."""


class Mover:
    """Memory, hazards and actions in flight of a replay. Raises ReplayError where it is stuck."""

    def __init__(
        self, unit: UnitSpec, models: Iterable[ModelSpec], rng: Random, first_id: int
    ) -> None:
        self.memory = ReplayMemory(unit, {spec.name: spec for spec in models}, rng)
        self.bases = [name for name, p in self.memory.models.items() if p.spec.base is None]
        """Models, without the adapters."""
        self.held: dict[RequestId, Held] = {}
        self.out: list[UnitAction] = []
        """Planned actions nobody has taken yet."""
        self.in_flight: set[ActionId] = set()
        self.counts: dict[str, int] = {}
        """What was done to the record's memory, by kind."""
        self._rng = rng
        self._hazards = Hazards()
        self._next_id = first_id
        self._loading: dict[ModelName, ActionId] = {}
        self._needed: set[ModelName] = set()
        """Weights of the step that room is made for."""

    def ended(self, action: ActionId) -> None:
        self.in_flight.remove(action)
        self._hazards.done(action)
        for model, load in list(self._loading.items()):
            if load == action:
                del self._loading[model]

    def prepare(
        self,
        model: ModelName,
        held: Sequence[Held],
        ends: Sequence[int],
        adapters: Sequence[ModelName] = (),
    ) -> ActionId | None:
        """Weights, slots and pages for a step that reaches position ends[i] - 1 of held[i].

        Returns the Load of the model that is in flight, if any.
        """
        try:
            self._place(model, held, ends, adapters)
        except ReplayError:
            # The step's own pages may be so scattered that they pin every granule: pack them.
            for h in held:
                if h.pages:
                    self.park(h)
            self._place(model, held, ends, adapters)
        self._needed = set()
        return self._loading.get(model)

    def _place(
        self,
        model: ModelName,
        held: Sequence[Held],
        ends: Sequence[int],
        adapters: Sequence[ModelName],
    ) -> None:
        keep = {h.request for h in held}
        self._needed = {model, *adapters}
        for name in (model, *adapters):
            self._ensure_weights(name, keep)
        for h, end in zip(held, ends, strict=True):
            if h.units:
                self.resume(h, keep)
            self._ensure_slot(h, keep)
            missing = self.memory.models[model].pages_for(end) - len(h.pages)
            if missing > 0:
                h.pages.extend(self._pages(model, missing, keep))

    def hold(self, request: RequestId, model: ModelName) -> Held:
        return self.held.setdefault(request, Held(request, model))

    def let_go(self, held: Held) -> None:
        """The request's last step is planned: everything it has is free."""
        self.memory.models[held.model].live.difference_update(held.pages)
        self.memory.free_units.extend(held.units)
        self.leave_slot(held)
        del self.held[held.request]

    def _ensure_weights(self, model: ModelName, keep: set[RequestId]) -> None:
        places = self.memory.models[model]
        if places.weights:
            return
        self._make_room(places.num_weight_granules, model, keep)
        places.weights = self.memory.take_granules(places.num_weight_granules)
        writes: list[Resource] = [("w", model), *(("g", g) for g in places.weights)]
        action = self._emit(Load, (), writes, model=model, granules=places.weights)
        self._loading[model] = action

    def drop(self, model: ModelName) -> None:
        places = self.memory.models[model]
        writes: list[Resource] = [("w", model), *(("g", g) for g in places.weights)]
        self._emit(Drop, (), writes, model=model, granules=places.weights)
        self.memory.free_granules.extend(places.weights)
        places.weights = ()
        self._loading.pop(model, None)
        self.count("drop")

    def _pages(self, model: ModelName, count: int, keep: set[RequestId]) -> list[PageId]:
        """Pages for a step or a resume, mapping granules and making room where needed."""
        places = self.memory.models[model]
        for _ in range(10):
            wanted = places.grow(count, self._rng)
            if wanted is None:
                raise ReplayError(f"{model}: its KV range is too small for the record")
            if len(wanted) > len(self.memory.free_granules):
                self._make_room(len(wanted), model, keep)
                continue  # something of this range may have been unmapped
            if wanted:
                self.map(places, wanted)
            return self.memory.take_pages(model, count)
        raise ReplayError(f"{model}: no room for {count} pages")

    def map(self, places: ModelPlaces, at: Sequence[int]) -> None:
        granules = self.memory.take_granules(len(at))
        places.mapped.update(zip(at, granules, strict=True))
        model = places.spec.name
        self._emit(
            MapKv, (), _remap(model, at, granules), model=model, at=tuple(at), granules=granules
        )

    def unmap(self, places: ModelPlaces, at: Sequence[int]) -> None:
        granules = tuple(places.mapped.pop(i) for i in at)
        model = places.spec.name
        self._emit(
            UnmapKv, (), _remap(model, at, granules), model=model, at=tuple(at), granules=granules
        )
        self.memory.free_granules.extend(granules)
        self.count("unmap")

    def _make_room(self, granules: int, model: ModelName, keep: set[RequestId]) -> None:
        """Free so many granules: empty KV first, then other models' weights and requests."""
        while len(self.memory.free_granules) < granules:
            empty = [p for p in self.memory.models.values() if p.empty()]
            needed = self._needed | {model}
            others = [n for n, p in self.memory.models.items() if p.weights and n not in needed]
            resident = [h for h in self.held.values() if h.pages and h.request not in keep]
            if empty:
                places = self._rng.choice(empty)
                self.unmap(places, places.empty())
            elif others and (not resident or self._rng.random() < 0.5):
                self.drop(self._rng.choice(others))
            elif resident:
                self.park(self._rng.choice(resident))
            else:
                raise ReplayError(f"{granules} granules for {model} are more than the unit has")

    def _ensure_slot(self, held: Held, keep: set[RequestId]) -> None:
        if held.slot is not None:
            return
        if not self.memory.free_slots:
            others = [h for h in self.held.values() if h.slot is not None and h.request not in keep]
            if not others:
                raise ReplayError("more rows than slots")
            self.leave_slot(self._rng.choice(others))
        slot = self._rng.choice(self.memory.free_slots)
        self.memory.free_slots.remove(slot)
        held.slot = slot

    def leave_slot(self, held: Held) -> None:
        if held.slot is not None:
            self.memory.free_slots.append(held.slot)
        held.slot, held.in_table, held.on_device = None, 0, False

    def park(self, held: Held) -> None:
        """Everything the request has on the device goes to the host store."""
        places = self.memory.models[held.model]
        filled = held.pages[: places.pages_for(held.tokens)]
        units = self.memory.take_units(len(filled))
        if units is None:
            raise ReplayError("the host store is too small for the record")
        held.units = units
        held.extents = self.memory.extents(units, places.spec.page_bytes)
        if filled:
            self._copy(held, filled, "host")
        places.live.difference_update(held.pages)
        held.pages = []
        self.leave_slot(held)
        self.count("park")

    def resume(self, held: Held, keep: set[RequestId]) -> None:
        held.pages = self._pages(held.model, len(held.units), keep)
        self._copy(held, held.pages, "device")
        self.memory.free_units.extend(held.units)
        held.units, held.extents = [], ()
        self.count("resume")

    def _copy(self, held: Held, pages: Sequence[PageId], to: str) -> None:
        on_device: list[Resource] = [("page", held.model, page) for page in pages]
        on_host: list[Resource] = [("host", unit) for unit in held.units]
        reads, writes = (on_device, on_host) if to == "host" else (on_host, on_device)
        self._emit(
            CopyKv,
            [*reads, *self._under(held.model, pages)],
            writes,
            model=held.model,
            request=held.request,
            pages=tuple(pages),
            extents=held.extents,
            tokens=held.tokens,
            to=to,
        )

    def _under(self, model: ModelName, pages: Sequence[PageId]) -> list[Resource]:
        """The virtual granules beneath these pages."""
        places = self.memory.models[model]
        return [("kg", model, at) for at in sorted({at for p in pages for at in places.span(p)})]

    def _emit(
        self,
        kind: type[_A],
        reads: Sequence[Resource],
        writes: Sequence[Resource],
        *,
        except_for: ActionId | None = None,
        **fields: Any,
    ) -> ActionId:
        action = ActionId(self._next_id)
        self._next_id += 1
        after = self._hazards.plan(action, reads=reads, writes=writes, except_for=except_for)
        self.out.append(kind(id=action, after=after, **fields))
        self.in_flight.add(action)
        return action

    def run(
        self,
        plan: StepPlan,
        held: Sequence[Held],
        follow: ActionId | None,
    ) -> ActionId:
        """A step over everything these requests hold."""
        adapters = {row.adapter for row in plan.rows if row.adapter is not None}
        reads: list[Resource] = [("w", name) for name in (plan.model, *sorted(adapters))]
        writes: list[Resource] = []
        for h in held:
            reads.extend(self._under(h.model, h.pages))
            writes.extend(("page", h.model, page) for page in h.pages)
            writes.append(("slot", h.slot))
        return self._emit(Run, reads, writes, except_for=follow, plan=plan, follow=follow)

    def count(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1


def _remap(model: ModelName, at: Sequence[int], granules: Sequence[int]) -> list[Resource]:
    return [*(("kg", model, i) for i in at), *(("g", g) for g in granules)]

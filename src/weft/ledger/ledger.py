"""The one place that decides memory. The arena obeys; `check_integrity` compares both sides.

A resource returns to its free list only when the last action that names it has ended; until then
it belongs to its old owner. Every method either takes effect whole or not at all.
"""

from typing import Literal

from weft.core.ids import ActionId, GranuleId, ModelName, PageId, SlotId
from weft.core.model import ModelSpec
from weft.core.unit import UnitSpec
from weft.ledger.extents import ExtentAllocator
from weft.ledger.hazards import Hazards
from weft.ledger.kv_space import KvSpace
from weft.ledger.prefix import HostShelf, PrefixIndex

WeightState = Literal["absent", "loading", "resident", "dropping"]


class ModelMemory:
    """What one model holds."""

    def __init__(self, spec: ModelSpec, unit: UnitSpec, index: PrefixIndex) -> None:
        self.spec = spec
        self.weights: tuple[GranuleId, ...] = ()
        self.state: WeightState = "absent"
        self.load_action: ActionId | None = None
        self.kv = KvSpace(spec.page_bytes, unit.granule_bytes, unit.num_granules, index)
        self.weight_granules = -(-spec.weight_bytes // unit.granule_bytes)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.spec.page_tokens)

    def kv_granules_for(self, tokens: int) -> int:
        """Granules that hold the KV of `tokens` of one request, alone in the range."""
        total = self.pages_for(tokens) * self.spec.page_bytes
        return -(-total // self.kv.granule_bytes)

    @property
    def held_granules(self) -> int:
        return len(self.weights) + len(self.kv.granules)


class Ledger:
    """Granules, pages, extents and slots of one unit, and the hazards between their users."""

    def __init__(self, unit: UnitSpec) -> None:
        self.unit = unit
        self.models: dict[ModelName, ModelMemory] = {}
        self.hazards = Hazards()
        self.extents = ExtentAllocator(unit.host_offset, unit.host_bytes, unit.host_chunk_bytes)
        self.shelf = HostShelf(self.extents)
        self._free_granules: list[GranuleId] = [
            GranuleId(i) for i in range(unit.num_granules - 1, -1, -1)
        ]
        self._free_slots: list[SlotId] = [SlotId(i) for i in range(unit.num_slots - 1, -1, -1)]
        self.slots_taken: set[SlotId] = set()

    # -- models ---------------------------------------------------------------------------------

    def add_model(self, spec: ModelSpec) -> None:
        if spec.name in self.models:
            self.models[spec.name].spec = spec
        else:
            self.models[spec.name] = ModelMemory(spec, self.unit, PrefixIndex(self.shelf.unsaved))

    def remove_model(self, name: ModelName) -> None:
        memory = self.models[name]
        assert memory.state == "absent" and not memory.kv.granules, "still holds memory"
        self.shelf.drop_all(memory.kv.index)
        del self.models[name]

    # -- granules -------------------------------------------------------------------------------

    @property
    def free_granules(self) -> int:
        return len(self._free_granules)

    def begin_load(self, name: ModelName, action: ActionId) -> tuple[GranuleId, ...] | None:
        """Granules for the whole image, or None if there are too few."""
        memory = self.models[name]
        assert memory.state == "absent"
        if memory.weight_granules > len(self._free_granules):
            return None
        memory.weights = tuple(self._take_granules(memory.weight_granules))
        memory.state, memory.load_action = "loading", action
        return memory.weights

    def end_load(self, name: ModelName) -> None:
        memory = self.models[name]
        memory.state, memory.load_action = "resident", None

    def fail_load(self, name: ModelName) -> None:
        self._return_weights(self.models[name])

    def begin_drop(self, name: ModelName) -> tuple[GranuleId, ...]:
        memory = self.models[name]
        assert memory.state == "resident"
        memory.state = "dropping"
        return memory.weights

    def end_drop(self, name: ModelName) -> None:
        self._return_weights(self.models[name])

    def fail_drop(self, name: ModelName) -> None:
        self.models[name].state = "resident"

    def _return_weights(self, memory: ModelMemory) -> None:
        self._free_granules.extend(reversed(memory.weights))
        memory.weights, memory.state, memory.load_action = (), "absent", None

    def _take_granules(self, count: int) -> list[GranuleId]:
        return [self._free_granules.pop() for _ in range(count)]

    # -- KV -------------------------------------------------------------------------------------

    def plan_growth(
        self, name: ModelName, pages: int, *, give_up: bool = False
    ) -> list[int] | None:
        """Virtual granules to map so that `pages` more can be taken: [] if none are needed, None
        if the range or the free granules do not allow it. `give_up`: cached pages may be taken."""
        space = self.models[name].kv
        missing = pages - (space.num_takeable if give_up else space.num_free)
        if missing <= 0:
            return []
        if not self._free_granules:
            return None
        at = space.choose_virtual(missing)
        return at if at and len(at) <= len(self._free_granules) else None

    def growth_granules(self, name: ModelName, pages: int) -> int | None:
        """How many granules it takes so that `pages` can be taken, cached ones among them; None
        if the range is too small."""
        space = self.models[name].kv
        missing = pages - space.num_takeable
        if missing <= 0:
            return 0
        return len(space.choose_virtual(missing)) or None

    def begin_map(self, name: ModelName, at: list[int], action: ActionId) -> list[GranuleId]:
        granules = self._take_granules(len(at))
        self.models[name].kv.begin_map(at, granules, action)
        return granules

    def end_map(self, name: ModelName, at: tuple[int, ...]) -> None:
        self.models[name].kv.end_map(at)

    def break_map(self, name: ModelName, at: tuple[int, ...]) -> None:
        """A map failed; `settle_broken` finishes it when its live pages are given back."""
        self.models[name].kv.break_map(at)

    def lost_pages(self, name: ModelName) -> set[PageId]:
        """Live pages over granules whose map failed."""
        space = self.models[name].kv
        if not space.broken:
            return set()
        return {page for page in space.live if not space.broken.isdisjoint(space.span(page))}

    def settle_broken(self, name: ModelName) -> None:
        space = self.models[name].kv
        if space.broken and not self.lost_pages(name):
            self._free_granules.extend(space.end_broken(tuple(sorted(space.broken))))

    def begin_unmap(self, name: ModelName, at: list[int]) -> list[GranuleId]:
        return self.models[name].kv.begin_unmap(at)

    def end_unmap(self, name: ModelName, at: tuple[int, ...]) -> None:
        self._free_granules.extend(self.models[name].kv.end_unmap(at))

    def fail_unmap(self, name: ModelName, at: tuple[int, ...]) -> None:
        self.models[name].kv.fail_unmap(at)

    # -- slots ----------------------------------------------------------------------------------

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def take_slot(self) -> SlotId:
        slot = self._free_slots.pop()
        self.slots_taken.add(slot)
        return slot

    def give_slot(self, slot: SlotId) -> None:
        self.slots_taken.remove(slot)
        self._free_slots.append(slot)

    # -- the other side -------------------------------------------------------------------------

    def mapped(self) -> dict[str, tuple[int, ...]]:
        """For Executor.check_integrity: what should lie under each virtual range, when idle."""
        out: dict[str, tuple[int, ...]] = {}
        for name, memory in self.models.items():
            out[f"{name}/weights"] = tuple(memory.weights)
            top = max(memory.kv.granules, default=-1) + 1
            out[f"{name}/kv"] = tuple(memory.kv.granules.get(i, GranuleId(-1)) for i in range(top))
        return out

    def check_integrity(self) -> None:
        """Every granule, page, extent and slot has exactly one owner. Raises AssertionError."""
        owners: dict[GranuleId, str] = {}

        def own(granule: GranuleId, owner: str) -> None:
            assert granule not in owners, f"granule {granule}: {owners.get(granule)} and {owner}"
            owners[granule] = owner

        for granule in self._free_granules:
            own(granule, "free")
        for name, memory in self.models.items():
            assert (memory.state == "absent") == (not memory.weights), f"{name}: {memory.state}"
            for granule in memory.weights:
                own(granule, f"{name}/weights")
            for granule in memory.kv.granules.values():
                own(granule, f"{name}/kv")
            memory.kv.check_integrity()
        assert len(owners) == self.unit.num_granules, "granules lost"
        assert len(self._free_slots) + len(self.slots_taken) == self.unit.num_slots
        self.extents.check_integrity()
        self.shelf.check_integrity()
        self.hazards.check_integrity()

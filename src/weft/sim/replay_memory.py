"""Memory choices of the plan replayer: small free lists, everything chosen at random.

Deliberately not the ledger: what is tested must not choose the test's memory. A resource is free
as soon as the action that frees it is planned; whoever takes it follows that action (`after`).
"""

from random import Random

from weft.core.ids import GranuleId, ModelName, PageId, SlotId
from weft.core.model import ModelSpec
from weft.core.request import Extent
from weft.core.unit import UnitSpec

ALIGN_BYTES = 4096


class ModelPlaces:
    """Where one model lies: granules of its weights and under its KV range, and its live pages."""

    def __init__(self, spec: ModelSpec, unit: UnitSpec) -> None:
        self.spec = spec
        self.num_weight_granules = -(-spec.weight_bytes // unit.granule_bytes)
        self.weights: tuple[GranuleId, ...] = ()
        self.mapped: dict[int, GranuleId] = {}
        """Physical granule by virtual granule of the KV range."""
        self.live: set[PageId] = set()
        self._granule_bytes = unit.granule_bytes
        self._num_virtual = unit.num_granules
        self._num_pages = unit.num_granules * unit.granule_bytes // spec.page_bytes

    def span(self, page: int) -> range:
        """Virtual granules that a page touches."""
        size, granule = self.spec.page_bytes, self._granule_bytes
        return range(page * size // granule, ((page + 1) * size - 1) // granule + 1)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.spec.page_tokens)

    def usable(self) -> list[PageId]:
        """Free pages over mapped granules only."""
        size, granule = self.spec.page_bytes, self._granule_bytes
        near = {
            page
            for at in self.mapped
            for page in range(at * granule // size, -(-(at + 1) * granule // size))
            if page < self._num_pages
        }
        return sorted(
            PageId(page)
            for page in near
            if page not in self.live and all(at in self.mapped for at in self.span(page))
        )

    def empty(self) -> list[int]:
        """Mapped virtual granules that no live page touches."""
        busy = {at for page in self.live for at in self.span(page)}
        return [at for at in self.mapped if at not in busy]

    def grow(self, pages: int, rng: Random) -> list[int] | None:
        """Virtual granules to map so that `pages` pages are usable: around random pages.

        None if the range cannot hold so many.
        """
        have = set(self.mapped)
        missing = pages - len(self.usable())
        chosen: list[int] = []
        begin = rng.randrange(max(1, self._num_pages))
        for offset in range(self._num_pages):
            if missing <= 0:
                return chosen
            page = (begin + offset) % self._num_pages
            if page in self.live or all(at in self.mapped for at in self.span(page)):
                continue
            fresh = [at for at in self.span(page) if at not in have]
            chosen.extend(fresh)
            have.update(fresh)
            missing -= 1
        return chosen if missing <= 0 else None


class ReplayMemory:
    """Granules, slots and host space of one unit."""

    def __init__(self, unit: UnitSpec, models: dict[ModelName, ModelSpec], rng: Random) -> None:
        self.unit = unit
        self.models = {name: ModelPlaces(spec, unit) for name, spec in models.items()}
        self.free_granules = [GranuleId(i) for i in range(unit.num_granules)]
        self.free_slots = [SlotId(i) for i in range(unit.num_slots)]
        self._rng = rng
        largest = max(spec.page_bytes for spec in models.values())
        self._unit_bytes = -(-largest // ALIGN_BYTES) * ALIGN_BYTES
        self.free_units = self._host_units()

    def _host_units(self) -> list[int]:
        """Offsets of pieces of the host region that hold any one page and cross no chunk."""
        unit, size = self.unit, self._unit_bytes
        offsets: list[int] = []
        at = -(-unit.host_offset // ALIGN_BYTES) * ALIGN_BYTES
        while at + size <= unit.host_offset + unit.host_bytes:
            border = (at // unit.host_chunk_bytes + 1) * unit.host_chunk_bytes
            if at + size > border:
                at = border
                continue
            offsets.append(at)
            at += size
        return offsets

    def take_granules(self, count: int) -> tuple[GranuleId, ...]:
        """Random free ones. The caller has checked that there are enough."""
        chosen = self._rng.sample(self.free_granules, count)
        gone = set(chosen)
        self.free_granules = [g for g in self.free_granules if g not in gone]
        return tuple(chosen)

    def take_pages(self, model: ModelName, count: int) -> list[PageId]:
        places = self.models[model]
        chosen = self._rng.sample(places.usable(), count)
        places.live.update(chosen)
        return chosen

    def take_units(self, count: int) -> list[int] | None:
        """Host pieces, one a page; None if there are too few."""
        if count > len(self.free_units):
            return None
        chosen = self._rng.sample(self.free_units, count)
        gone = set(chosen)
        self.free_units = [u for u in self.free_units if u not in gone]
        return chosen

    def extents(self, units: list[int], page_bytes: int) -> tuple[Extent, ...]:
        """One page in each piece, now and then as two extents."""
        out: list[Extent] = []
        for unit in units:
            cut = self._rng.randrange(page_bytes) if self._rng.random() < 0.3 else 0
            if cut:
                out.append(Extent(unit, cut))
            out.append(Extent(unit + cut, page_bytes - cut))
        return tuple(out)

    def mapped(self) -> dict[str, tuple[int, ...]]:
        """For Executor.check_integrity, once everything planned is done."""
        out: dict[str, tuple[int, ...]] = {}
        for name, places in self.models.items():
            top = max(places.mapped, default=-1) + 1
            out[f"{name}/weights"] = tuple(places.weights)
            out[f"{name}/kv"] = tuple(places.mapped.get(i, -1) for i in range(top))
        return out

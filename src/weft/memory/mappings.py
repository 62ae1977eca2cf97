"""Who lies where: the bookkeeping half of an arena. Pure; the other half moves memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from weft.memory.base import UNMAPPED, ArenaError, RangeName


@dataclass
class Mappings:
    """Virtual granules of every range and the physical granule at each.

    Checks an order whole before any of it is entered, so that a refused order changes nothing.
    """

    num_granules: int
    _at: dict[tuple[str, RangeName], list[int]] = field(default_factory=dict)
    _owner: dict[int, tuple[str, RangeName, int]] = field(default_factory=dict)

    def add(self, model: str, range_name: RangeName, granules: int) -> None:
        """Make a range of that many virtual granules known, all unmapped."""
        if (model, range_name) in self._at:
            raise ArenaError(f"{model!r} is reserved already")
        self._at[model, range_name] = [UNMAPPED] * granules

    def check_empty(self, model: str, range_name: RangeName) -> None:
        held = [g for g in self._range(model, range_name) if g != UNMAPPED]
        if held:
            raise ArenaError(f"{model}/{range_name} still holds granules {held[:8]}")

    def remove(self, model: str, range_name: RangeName) -> None:
        """Forget a range. Raises ArenaError if something is mapped in it."""
        self.check_empty(model, range_name)
        del self._at[model, range_name]

    def check_map(
        self, model: str, range_name: RangeName, at: Sequence[int], granules: Sequence[int]
    ) -> None:
        target = self._check_order(model, range_name, at, granules)
        for place, granule in zip(at, granules, strict=True):
            if target[place] != UNMAPPED:
                raise ArenaError(
                    f"{model}/{range_name}[{place}] holds granule {target[place]} already"
                )
            if granule in self._owner:
                owner = self._owner[granule]
                raise ArenaError(
                    f"granule {granule} is mapped at {owner[0]}/{owner[1]}[{owner[2]}]"
                )

    def check_unmap(
        self, model: str, range_name: RangeName, at: Sequence[int], granules: Sequence[int]
    ) -> None:
        target = self._check_order(model, range_name, at, granules)
        for place, granule in zip(at, granules, strict=True):
            if target[place] != granule:
                raise ArenaError(
                    f"{model}/{range_name}[{place}] holds granule {target[place]}, not {granule}"
                )

    def enter(self, model: str, range_name: RangeName, place: int, granule: int) -> None:
        """Note a granule as mapped; the order was checked."""
        self._at[model, range_name][place] = granule
        self._owner[granule] = (model, range_name, place)

    def leave(self, model: str, range_name: RangeName, place: int) -> None:
        """Note a virtual granule as unmapped; the order was checked."""
        row = self._at[model, range_name]
        self._owner.pop(row[place], None)
        row[place] = UNMAPPED

    def mapped(self) -> dict[str, tuple[int, ...]]:
        return {f"{model}/{name}": tuple(row) for (model, name), row in self._at.items()}

    def places(self) -> list[tuple[str, RangeName, int]]:
        """Every virtual granule that holds something."""
        return sorted(self._owner.values())

    @property
    def num_mapped(self) -> int:
        return len(self._owner)

    def _range(self, model: str, range_name: RangeName) -> list[int]:
        try:
            return self._at[model, range_name]
        except KeyError:
            raise ArenaError(f"{model}/{range_name} is not reserved") from None

    def _check_order(
        self, model: str, range_name: RangeName, at: Sequence[int], granules: Sequence[int]
    ) -> list[int]:
        target = self._range(model, range_name)
        if len(at) != len(granules):
            raise ArenaError(f"{len(at)} places for {len(granules)} granules")
        if len(set(at)) != len(at) or len(set(granules)) != len(granules):
            raise ArenaError("a place or a granule is named twice in one order")
        for place in at:
            if not 0 <= place < len(target):
                raise ArenaError(f"virtual granule {place} is outside 0 .. {len(target) - 1}")
        for granule in granules:
            if not 0 <= granule < self.num_granules:
                raise ArenaError(f"granule {granule} is outside 0 .. {self.num_granules - 1}")
        return target

"""The CPU's arena: anonymous mappings with an honest budget.

A range is reserved without memory behind it (MAP_NORESERVE); pages come when touched and go back
to the system at `unmap`. So what is resident never exceeds what is mapped, as on a GPU.
"""

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.memory.base import RANGE_NAMES, UNMAPPED, ArenaError, RangeName, range_granules

# Absent from the mmap module before Python 3.13; the value is Linux's on all its 64-bit ports.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_HUGE_PAGE_BYTES = 2 << 20


@dataclass
class _Range:
    memory: mmap.mmap
    tensor: torch.Tensor
    """uint8 over the whole mapping; keeps it alive."""
    at: list[int]
    """Granule at every virtual granule, UNMAPPED where none."""


class CpuArena:
    """Implements `memory.base.Arena`.

    `granule_bytes` is a multiple of the system's page size. `poison` fills every freshly mapped
    granule with 0xFF (NaN in every float dtype), so that reading what was never written shows.
    """

    def __init__(self, granule_bytes: int, num_granules: int, *, poison: bool = False) -> None:
        if granule_bytes <= 0 or granule_bytes % mmap.PAGESIZE:
            raise ValueError(f"granule_bytes {granule_bytes} is no multiple of {mmap.PAGESIZE}")
        if num_granules < 0:
            raise ValueError(f"num_granules is {num_granules}")
        self._granule_bytes = granule_bytes
        self._num_granules = num_granules
        self._poison = poison
        self._ranges: dict[tuple[str, RangeName], _Range] = {}
        self._owner: dict[int, tuple[str, RangeName, int]] = {}

    @property
    def granule_bytes(self) -> int:
        return self._granule_bytes

    @property
    def num_granules(self) -> int:
        return self._num_granules

    @property
    def mapped_granules(self) -> int:
        """Granules mapped now, at most `num_granules`."""
        return len(self._owner)

    def reserve(self, model: str, weights_bytes: int, kv_bytes: int) -> None:
        if (model, RANGE_NAMES[0]) in self._ranges:
            raise ArenaError(f"{model!r} is reserved already")
        made = [
            (name, self._new_range(num_bytes))
            for name, num_bytes in zip(RANGE_NAMES, (weights_bytes, kv_bytes), strict=True)
        ]
        for name, new in made:
            self._ranges[model, name] = new

    def map(
        self, model: str, range_name: RangeName, at: Sequence[int], granules: Sequence[int]
    ) -> None:
        target = self._range(model, range_name)
        self._check_order(target, at, granules)
        for place, granule in zip(at, granules, strict=True):
            if target.at[place] != UNMAPPED:
                raise ArenaError(
                    f"{model}/{range_name}[{place}] holds granule {target.at[place]} already"
                )
            if granule in self._owner:
                owner = self._owner[granule]
                raise ArenaError(
                    f"granule {granule} is mapped at {owner[0]}/{owner[1]}[{owner[2]}]"
                )
        for place, granule in zip(at, granules, strict=True):
            target.at[place] = granule
            self._owner[granule] = (model, range_name, place)
            if self._poison:
                begin = place * self._granule_bytes
                target.tensor[begin : begin + self._granule_bytes].fill_(0xFF)

    def unmap(
        self, model: str, range_name: RangeName, at: Sequence[int], granules: Sequence[int]
    ) -> None:
        target = self._range(model, range_name)
        self._check_order(target, at, granules)
        for place, granule in zip(at, granules, strict=True):
            if target.at[place] != granule:
                raise ArenaError(
                    f"{model}/{range_name}[{place}] holds granule {target.at[place]}, not {granule}"
                )
        for place, granule in zip(at, granules, strict=True):
            target.at[place] = UNMAPPED
            del self._owner[granule]
            target.memory.madvise(
                mmap.MADV_DONTNEED, place * self._granule_bytes, self._granule_bytes
            )

    def tensor(self, model: str, range_name: RangeName) -> torch.Tensor:
        return self._range(model, range_name).tensor

    def mapped(self) -> dict[str, tuple[int, ...]]:
        return {f"{model}/{name}": tuple(r.at) for (model, name), r in self._ranges.items()}

    def release(self, model: str) -> None:
        for name in RANGE_NAMES:
            held = [g for g in self._range(model, name).at if g != UNMAPPED]
            if held:
                raise ArenaError(f"{model}/{name} still holds granules {held[:8]}")
        for name in RANGE_NAMES:
            del self._ranges[model, name]

    def close(self) -> None:
        # The mappings go with the last tensor over them: an explicit munmap would pull the memory
        # from under views that others still hold.
        for target in self._ranges.values():
            target.memory.madvise(mmap.MADV_DONTNEED)
        self._ranges.clear()
        self._owner.clear()

    def _new_range(self, num_bytes: int) -> _Range:
        count = max(1, range_granules(num_bytes, self._granule_bytes))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            memory = mmap.mmap(-1, count * self._granule_bytes, flags=flags)
        except OSError as error:
            raise ArenaError(f"no address space for {count} granules: {error}") from None
        if self._granule_bytes % _HUGE_PAGE_BYTES:
            # A huge page would hold memory beyond the granule that was touched.
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        return _Range(memory, torch.frombuffer(memory, dtype=torch.uint8), [UNMAPPED] * count)

    def _range(self, model: str, range_name: RangeName) -> _Range:
        try:
            return self._ranges[model, range_name]
        except KeyError:
            raise ArenaError(f"{model}/{range_name} is not reserved") from None

    def _check_order(self, target: _Range, at: Sequence[int], granules: Sequence[int]) -> None:
        if len(at) != len(granules):
            raise ArenaError(f"{len(at)} places for {len(granules)} granules")
        if len(set(at)) != len(at) or len(set(granules)) != len(granules):
            raise ArenaError("a place or a granule is named twice in one order")
        for place in at:
            if not 0 <= place < len(target.at):
                raise ArenaError(f"virtual granule {place} is outside 0 .. {len(target.at) - 1}")
        for granule in granules:
            if not 0 <= granule < self._num_granules:
                raise ArenaError(f"granule {granule} is outside 0 .. {self._num_granules - 1}")


def resident_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a page-aligned tensor's memory that the system holds in RAM (mincore)."""
    pages = -(-tensor.numel() * tensor.element_size() // mmap.PAGESIZE)
    held = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(tensor.data_ptr())
    if libc.mincore(address, ctypes.c_size_t(pages * mmap.PAGESIZE), held) != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in held) * mmap.PAGESIZE

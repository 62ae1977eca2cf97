"""The CPU's arena: anonymous mappings with an honest budget.

A range is reserved without memory behind it (MAP_NORESERVE); pages come when touched and go back
to the system at `unmap`. So what is resident never exceeds what is mapped, as on a GPU.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.memory.base import RANGE_NAMES, ArenaError, RangeName, range_granules
from weft.memory.mappings import Mappings

# Absent from the mmap module before Python 3.13; the value is Linux's on all its 64-bit ports.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True)
class _Range:
    memory: mmap.mmap
    tensor: torch.Tensor
    """uint8 over the whole mapping; keeps it alive."""


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
        self._mappings = Mappings(num_granules)
        self._poison = poison
        self._ranges: dict[tuple[str, RangeName], _Range] = {}

    @property
    def granule_bytes(self) -> int:
        return self._granule_bytes

    @property
    def num_granules(self) -> int:
        return self._mappings.num_granules

    @property
    def mapped_granules(self) -> int:
        """Granules mapped now, at most `num_granules`."""
        return self._mappings.num_mapped

    def reserve(self, model: str, weights_bytes: int, kv_bytes: int) -> None:
        if (model, RANGE_NAMES[0]) in self._ranges:
            raise ArenaError(f"{model!r} is reserved already")
        made = [
            (name, self._new_range(num_bytes))
            for name, num_bytes in zip(RANGE_NAMES, (weights_bytes, kv_bytes), strict=True)
        ]
        for name, new in made:
            self._mappings.add(model, name, new.tensor.numel() // self._granule_bytes)
            self._ranges[model, name] = new

    def map(
        self, model: str, range_name: RangeName, at: Sequence[int], granules: Sequence[int]
    ) -> None:
        self._mappings.check_map(model, range_name, at, granules)
        for place, granule in zip(at, granules, strict=True):
            self._mappings.enter(model, range_name, place, granule)
            if self._poison:
                begin = place * self._granule_bytes
                fresh = self._ranges[model, range_name].tensor[begin : begin + self._granule_bytes]
                fresh.fill_(0xFF)

    def unmap(
        self, model: str, range_name: RangeName, at: Sequence[int], granules: Sequence[int]
    ) -> None:
        self._mappings.check_unmap(model, range_name, at, granules)
        for place in at:
            self._mappings.leave(model, range_name, place)
            self._ranges[model, range_name].memory.madvise(
                mmap.MADV_DONTNEED, place * self._granule_bytes, self._granule_bytes
            )

    def tensor(self, model: str, range_name: RangeName) -> torch.Tensor:
        try:
            return self._ranges[model, range_name].tensor
        except KeyError:
            raise ArenaError(f"{model}/{range_name} is not reserved") from None

    def mapped(self) -> dict[str, tuple[int, ...]]:
        return self._mappings.mapped()

    def release(self, model: str) -> None:
        for name in RANGE_NAMES:
            self._mappings.check_empty(model, name)
        for name in RANGE_NAMES:
            self._mappings.remove(model, name)
            del self._ranges[model, name]

    def close(self) -> None:
        # The mappings go with the last tensor over them: an explicit munmap would pull the memory
        # from under views that others still hold.
        for target in self._ranges.values():
            target.memory.madvise(mmap.MADV_DONTNEED)
        self._ranges.clear()
        self._mappings = Mappings(self.num_granules)

    def _new_range(self, num_bytes: int) -> _Range:
        count = max(1, range_granules(num_bytes, self._granule_bytes))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            memory = mmap.mmap(-1, count * self._granule_bytes, flags=flags)
        except OSError as error:
            raise ArenaError(f"no address space for {count} granules: {error}") from None
        if self._granule_bytes % _HUGE_PAGE_BYTES:
            # A huge page would hold memory beyond the granule that was touched. A kernel built
            # without huge pages refuses the advice and needs none.
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_NOHUGEPAGE)
        return _Range(memory, torch.frombuffer(memory, dtype=torch.uint8))


def resident_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a page-aligned tensor's memory that the system holds in RAM (mincore)."""
    pages = -(-tensor.numel() * tensor.element_size() // mmap.PAGESIZE)
    held = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(tensor.data_ptr())
    if libc.mincore(address, ctypes.c_size_t(pages * mmap.PAGESIZE), held) != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in held) * mmap.PAGESIZE

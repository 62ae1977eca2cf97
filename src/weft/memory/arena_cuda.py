"""The CUDA arena: a pool of physical granules, mapped beneath reserved address ranges.

All physical memory is created once, at start, and kept: a switch maps and unmaps it, which costs
about 13 ms for 13 GB and disturbs nothing that runs (measured, granules of 64 MiB).
"""

from collections.abc import Sequence
from typing import Any

import torch

from weft.memory.base import RANGE_NAMES, ArenaError, RangeName, range_granules
from weft.memory.cuda import CudaError, check, driver, tensor_over
from weft.memory.mappings import Mappings


class CudaArena:
    """Implements `memory.base.Arena` on one device.

    `granule_bytes` must be a multiple of the device's own granularity (2 MiB).
    Raises ArenaError if the device has not that many granules free.
    """

    def __init__(
        self, granule_bytes: int, num_granules: int, *, device: torch.device | None = None
    ) -> None:
        self._device = device or torch.device("cuda", torch.cuda.current_device())
        # The runtime's primary context is what torch uses; make it current before the first call.
        torch.cuda.init()
        torch.zeros(1, device=self._device)
        self._cu = driver()
        self._granule_bytes = granule_bytes
        self._book = Mappings(num_granules)
        self._ranges: dict[tuple[str, RangeName], tuple[int, int, torch.Tensor]] = {}
        self._handles: list[Any] = []
        self._prop = self._allocation()
        least = check(
            self._cu.cuMemGetAllocationGranularity(
                self._prop,
                self._cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            )
        )
        if granule_bytes <= 0 or granule_bytes % least:
            raise ValueError(f"granule_bytes {granule_bytes} is no multiple of {least}")
        try:
            for _ in range(num_granules):
                self._handles.append(check(self._cu.cuMemCreate(granule_bytes, self._prop, 0)))
        except CudaError as error:
            made = len(self._handles)
            self.close()
            raise ArenaError(
                f"the device gave {made} of {num_granules} granules: {error}"
            ) from None

    @property
    def granule_bytes(self) -> int:
        return self._granule_bytes

    @property
    def num_granules(self) -> int:
        return self._book.num_granules

    def reserve(self, model: str, weights_bytes: int, kv_bytes: int) -> None:
        if (model, RANGE_NAMES[0]) in self._ranges:
            raise ArenaError(f"{model!r} is reserved already")
        made: list[tuple[RangeName, int, int]] = []
        try:
            for name, num_bytes in zip(RANGE_NAMES, (weights_bytes, kv_bytes), strict=True):
                size = max(1, range_granules(num_bytes, self._granule_bytes)) * self._granule_bytes
                base = check(self._cu.cuMemAddressReserve(size, self._granule_bytes, 0, 0))
                made.append((name, int(base), size))
        except CudaError as error:
            for _, base, size in made:
                check(self._cu.cuMemAddressFree(base, size))
            raise ArenaError(f"no address space for {model!r}: {error}") from None
        for name, base, size in made:
            self._book.add(model, name, size // self._granule_bytes)
            self._ranges[model, name] = (base, size, tensor_over(base, size, self._device))

    def map(
        self, model: str, range_name: RangeName, at: Sequence[int], granules: Sequence[int]
    ) -> None:
        self._book.check_map(model, range_name, at, granules)
        base, _, _ = self._ranges[model, range_name]
        done: list[int] = []
        try:
            for place, granule in zip(at, granules, strict=True):
                address = base + place * self._granule_bytes
                check(self._cu.cuMemMap(address, self._granule_bytes, 0, self._handles[granule], 0))
                done.append(place)
            for first, count in _runs(at):
                address = base + first * self._granule_bytes
                access = [self._access()]
                check(self._cu.cuMemSetAccess(address, count * self._granule_bytes, access, 1))
        except CudaError as error:
            for place in done:
                check(self._cu.cuMemUnmap(base + place * self._granule_bytes, self._granule_bytes))
            raise ArenaError(f"mapping {model}/{range_name} failed: {error}") from None
        for place, granule in zip(at, granules, strict=True):
            self._book.enter(model, range_name, place, granule)

    def unmap(
        self, model: str, range_name: RangeName, at: Sequence[int], granules: Sequence[int]
    ) -> None:
        self._book.check_unmap(model, range_name, at, granules)
        base, _, _ = self._ranges[model, range_name]
        for place in at:
            # One call a granule: an unmap must cover exactly what a map did.
            check(self._cu.cuMemUnmap(base + place * self._granule_bytes, self._granule_bytes))
            self._book.leave(model, range_name, place)

    def tensor(self, model: str, range_name: RangeName) -> torch.Tensor:
        try:
            return self._ranges[model, range_name][2]
        except KeyError:
            raise ArenaError(f"{model}/{range_name} is not reserved") from None

    def mapped(self) -> dict[str, tuple[int, ...]]:
        return self._book.mapped()

    def release(self, model: str) -> None:
        for name in RANGE_NAMES:
            self._book.check_empty(model, name)
        for name in RANGE_NAMES:
            base, size, _ = self._ranges.pop((model, name))
            self._book.remove(model, name)
            check(self._cu.cuMemAddressFree(base, size))

    def close(self) -> None:
        """Everything goes back to the device. Nothing may run on it any more (synchronise first).

        Errors of one call do not keep the others from being made; the first is raised at the end.
        """
        failures: list[CudaError] = []

        def attempt(result: tuple[Any, ...]) -> None:
            try:
                check(result)
            except CudaError as error:
                failures.append(error)

        for model, name, place in self._book.places():
            base, _, _ = self._ranges[model, name]
            address = base + place * self._granule_bytes
            attempt(self._cu.cuMemUnmap(address, self._granule_bytes))
            self._book.leave(model, name, place)
        for (model, name), (base, size, _) in self._ranges.items():
            self._book.remove(model, name)
            attempt(self._cu.cuMemAddressFree(base, size))
        self._ranges.clear()
        while self._handles:
            attempt(self._cu.cuMemRelease(self._handles.pop()))
        if failures:
            raise failures[0]

    def _allocation(self) -> Any:
        cu = self._cu
        prop = cu.CUmemAllocationProp()
        prop.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        prop.location.id = self._device.index
        return prop

    def _access(self) -> Any:
        cu = self._cu
        access = cu.CUmemAccessDesc()
        access.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self._device.index
        access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return access


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Adjacent places as (first, count), in ascending order."""
    runs: list[tuple[int, int]] = []
    for place in sorted(places):
        if runs and sum(runs[-1]) == place:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((place, 1))
    return runs

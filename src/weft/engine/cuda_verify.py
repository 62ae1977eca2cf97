"""Promise 1 on CUDA, for tests: checksums of what is copied, computed on the device, and checks
that what is touched is mapped."""

import threading
from functools import partial

import torch

from weft.core.actions import CopyKv, StepPlan
from weft.engine.adapters import BoundAdapter
from weft.engine.checksums import Checksums
from weft.engine.copies import page_fragments
from weft.engine.cuda_device import Device, Stream
from weft.engine.mapped import check_adapters_mapped, check_pages_mapped, check_weights_mapped
from weft.engine.model import BoundModel
from weft.kernels.word_sum import word_sum
from weft.memory.base import Arena
from weft.models.layout import LayoutExtent


class Verifier:
    """Queues checksums behind copies; the executor compares when the copies have ended.

    `host`: the whole host store as uint8.
    """

    def __init__(
        self, device: Device, arena: Arena, arena_lock: threading.Lock, host: torch.Tensor
    ) -> None:
        self.checksums = Checksums()
        self._device, self._arena, self._arena_lock = device, arena, arena_lock
        self._host: torch.Tensor | None = host
        self._image_sums: dict[tuple[str, int], int] = {}

    def close(self) -> None:
        """Let go of the host store."""
        self._host = None

    def sum_extent(
        self, stream: Stream, model: BoundModel | BoundAdapter, index: int, extent: LayoutExtent
    ) -> torch.Tensor:
        """Queue the sum of an extent just copied in; the first time also sum its host bytes."""
        key = (model.image.key, index)
        if key not in self._image_sums:
            assert self._host is not None
            begin = model.image.offset + extent.offset
            self._image_sums[key] = word_sum(self._host[begin : begin + extent.num_bytes])
        with stream.use():
            return self._device.sums(model.weights_bytes, [extent.offset], extent.num_bytes)

    def check_image(self, model: BoundModel | BoundAdapter, sums: list[torch.Tensor]) -> None:
        """Raises ChecksumError."""
        key = model.image.key
        for i, on_device in enumerate(sums):
            self.checksums.check_image(key, i, int(on_device), self._image_sums[key, i])

    def sum_pages(self, stream: Stream, model: BoundModel, action: CopyKv) -> "partial[None]":
        """Queue the sums of the pages a copy reads or writes; what to call when it has ended."""
        size = model.spec.page_bytes
        with stream.use():
            sums = self._device.sums(model.kv_bytes, [page * size for page in action.pages], size)
        return partial(self._check_pages, action, size, sums)

    def _check_pages(self, action: CopyKv, page_bytes: int, sums: torch.Tensor) -> None:
        places = page_fragments(len(action.pages), page_bytes, action.extents)
        if action.to == "host":
            self.checksums.parked(action.request, places, sums.tolist())
        else:
            self.checksums.check_resumed(action.request, places, sums.tolist())

    def check_copy(self, model: BoundModel, action: CopyKv) -> None:
        """Raises ArenaError if a page is not mapped."""
        self._check_mapped(model, action.pages, action.request)

    def check_step(self, plan: StepPlan, model: BoundModel, *, weights: bool) -> None:
        """The weights and the new pages; the older ones are known to the device only."""
        if weights:
            with self._arena_lock:
                held = self._arena.mapped()[f"{model.spec.name}/weights"]
            check_weights_mapped(model.spec, held)
        with self._arena_lock:
            check_adapters_mapped(plan, self._arena.mapped())
        for row in plan.rows:
            self._check_mapped(model, row.append_pages, row.request)

    def _check_mapped(self, model: BoundModel, pages: tuple[int, ...], request: int) -> None:
        with self._arena_lock:
            held = self._arena.mapped()[f"{model.spec.name}/kv"]
        granule_bytes = self._arena.granule_bytes
        check_pages_mapped(model.spec, granule_bytes, held, pages, f"request {request}")

"""The staging of a step in flight: what goes to the device in one or two copies, and what comes
back.

Everything that every step has lies at a fixed place, so addresses (and alignment, hence bits) do
not depend on the plan.

Shape legend: T tokens of a step, R rows, S sampling rows, K stop ids, P scored positions, H hidden
size.
"""

from collections.abc import Sequence

import numpy as np
import torch

from weft.core.actions import StepPlan
from weft.core.unit import UnitSpec
from weft.engine.sampler import signed64

ALIGN_WORDS = 32
"""Sections of a staging buffer begin at multiples of this many 8-byte words."""
NO_TOKEN = -1
_TORCH = {np.dtype(np.int64): torch.int64, np.dtype(np.float64): torch.float64}


def _pair(device: torch.device, words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A host side (pinned where the device is another one) and a device side, of 8-byte words."""
    pinned = device.type == "cuda"
    host = torch.zeros(words, dtype=torch.int64, pin_memory=pinned)
    return host, host if not pinned else torch.zeros_like(host, device=device)


class Area:
    """Room for arrays whose sizes the plan decides. Grows; one copy takes all of them."""

    def __init__(self, device: torch.device, words: int = 1024) -> None:
        self._device = device
        self._host, self._on_device = _pair(device, words)

    def put(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The flat int64 and float64 arrays on the device. Only while no step in flight uses what
        was put before; never waits."""
        total = sum(array.size for array in arrays)
        if total > self._host.numel():
            self._host, self._on_device = _pair(self._device, 1 << (total - 1).bit_length())
        host, out, at = self._host.numpy(), [], 0
        for array in arrays:
            host[at : at + array.size] = array.view(np.int64)
            out.append(self._on_device[at : at + array.size].view(_TORCH[array.dtype]))
            at += array.size
        if total and self._on_device is not self._host:
            self._on_device[:total].copy_(self._host[:total], non_blocking=True)
        return out


class Buffers:
    """The staging of one step in flight: a host side, a device side, fixed places in both.

    On the CPU both sides are the same memory.
    """

    def __init__(self, unit: UnitSpec, device: torch.device) -> None:
        rows, tokens = unit.max_rows, unit.max_step_tokens
        sizes = {
            "token_ids": tokens,
            "positions": tokens,
            "token_rows": tokens,
            "row_offsets": rows // 2 + 1,
            "row_starts": (rows + 1) // 2,
            "row_tokens": (rows + 1) // 2,
            "slots": rows,
            "sample_tokens": rows,
            "sample_slots": rows,
            "gather_tokens": rows,
            "gather_slots": rows,
            "temperature": rows,
            "top_p": rows,
            "top_k": rows,
            "min_p": rows,
            "seed": rows,
            "output_index": rows,
            "min_remaining": rows,
            "lora_tokens": rows,
            "lora_blocks": 3 * rows,
        }
        self.device = device
        self.places: dict[str, tuple[int, int]] = {}
        at = 0
        for name, size in sizes.items():
            self.places[name] = (at, size)
            at += -(-size // ALIGN_WORDS) * ALIGN_WORDS
        self.host, self.on_device = _pair(device, at)
        self.host_np = self.host.numpy()
        self.early, self.late = Area(device), Area(device)
        """What a plan brings before its forward pass, and what is prepared during it."""
        self.tokens = torch.full(
            (max(1, unit.max_repeat), rows),
            NO_TOKEN,
            dtype=torch.int64,
            pin_memory=device.type == "cuda",
        )
        """int64 [max_repeat, R] on the host: drawn tokens, sampling rows first to last."""
        self._results: dict[str, torch.Tensor] = {}
        self.in_use = False

    def fill(self, name: str, values: Sequence[int] | Sequence[float], dtype: type) -> None:
        at, size = self.places[name]
        self.host_np[at : at + size].view(dtype)[: len(values)] = values

    def view(self, name: str, count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        at, size = self.places[name]
        return self.on_device[at : at + size].view(dtype)[:count]

    def upload(self) -> None:
        if self.on_device is not self.host:
            self.on_device.copy_(self.host, non_blocking=True)

    def result(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory for what a step reports besides tokens. It keeps its content until the same
        name is asked for with more elements, or by the next step."""
        numel = int(np.prod(shape))
        held = self._results.get(name)
        if held is None or held.numel() < numel or held.dtype != dtype:
            size = 1 << max(numel - 1, 0).bit_length()
            pinned = self.device.type == "cuda"
            held = self._results[name] = torch.empty(size, dtype=dtype, pin_memory=pinned)
        return held[:numel].view(shape)


def stage_rows(plan: StepPlan, buffers: Buffers) -> None:
    """What every step has, into its places on the host side."""
    ids: list[int] = []
    positions: list[int] = []
    token_rows: list[int] = []
    offsets, gather, sample_tokens = [0], [], []
    for j, row in enumerate(plan.rows):
        if row.input is None:
            gather.append(len(ids))
        ids.extend((0,) if row.input is None else row.input)
        positions.extend(range(row.start, row.start + row.num_tokens))
        token_rows.extend([j] * row.num_tokens)
        offsets.append(len(ids))
        if row.sample is not None:
            sample_tokens.append(len(ids) - 1)
    rows = plan.rows
    sampling = [row for row in rows if row.sample is not None]
    settings = [row.sample for row in rows if row.sample is not None]
    fill = buffers.fill
    fill("token_ids", ids, np.int64)
    fill("positions", positions, np.int64)
    fill("token_rows", token_rows, np.int64)
    fill("row_offsets", offsets, np.int32)
    fill("row_starts", [row.start for row in rows], np.int32)
    fill("row_tokens", [row.num_tokens for row in rows], np.int32)
    fill("slots", [row.slot for row in rows], np.int64)
    fill("sample_tokens", sample_tokens, np.int64)
    fill("sample_slots", [row.slot for row in sampling], np.int64)
    fill("gather_tokens", gather, np.int64)
    fill("gather_slots", [row.slot for row in rows if row.input is None], np.int64)
    fill("temperature", [s.temperature for s in settings], np.float64)
    fill("top_p", [s.top_p for s in settings], np.float64)
    fill("top_k", [s.top_k for s in settings], np.int64)
    fill("min_p", [s.min_p for s in settings], np.float64)
    fill("seed", [signed64(s.seed) for s in settings], np.int64)
    fill("output_index", [row.output_index for row in sampling], np.int64)
    fill("min_remaining", [row.min_remaining for row in sampling], np.int64)


def page_entries(plan: StepPlan, table_width: int) -> tuple[np.ndarray, np.ndarray]:
    """New entries of the flattened page table: places and page ids."""
    places: list[int] = []
    pages: list[int] = []
    for row in plan.rows:
        if not row.append_pages:
            continue
        first = row.slot * table_width + row.first_page
        places.extend(range(first, first + len(row.append_pages)))
        pages.extend(row.append_pages)
    return np.array(places, dtype=np.int64), np.array(pages, dtype=np.int64)


def stop_table(plan: StepPlan) -> np.ndarray:
    """int64 [S, K], padded with NO_TOKEN; K is 0 where no stop id is masked."""
    rows = [row for row in plan.rows if row.sample is not None]
    masked = any(row.min_remaining > 0 for row in rows)
    width = max((len(row.stop_ids) for row in rows), default=0) if masked else 0
    table = np.full((len(rows), width), NO_TOKEN, dtype=np.int64)
    for i, row in enumerate(rows if width else ()):
        table[i, : len(row.stop_ids)] = row.stop_ids
    return table

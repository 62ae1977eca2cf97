"""Decode steps as CUDA graphs: a forward pass becomes one launch instead of hundreds.

A step of decode rows is filled up to one of a few batch sizes (buckets) with rows that belong to no
request, and reads its inputs from one fixed place. The first step of a kind runs launch by launch
and is captured afterwards, the others replay: the same kernels on the same shapes, so the same
bits. A graph survives that its model is evicted: addresses are stable.

What grows while a request goes on decides launch grids (how often keys are cut); it is rounded up
to a few sizes too.

Shape legend: R rows, B rows of the bucket, V vocabulary, N slots.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from weft.attention.base import ForwardBatch, HeadsBackend
from weft.core.actions import StepPlan
from weft.core.unit import UnitSpec
from weft.engine.model import BoundModel
from weft.engine.staging import Buffers
from weft.engine.step import Step
from weft.models.lora import LoraBatch, LoraOps, LoraPlan

log = logging.getLogger(__name__)

LONGEST = (512, 4096)
"""Contexts up to these lengths share a graph; longer ones have the model's own maximum."""
MAX_GRAPHS = 512
"""Of one lane. Further kinds of steps run without."""


def buckets(max_rows: int) -> tuple[int, ...]:
    """At most a dozen batch sizes, ascending; the last is max_rows."""
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 512)
    return (*(size for size in sizes if size < max_rows), max_rows)


def bucket_of(plan: StepPlan, unit: UnitSpec) -> int | None:
    """How many rows the step is filled up to; None where it is not only decode rows."""
    for row in plan.rows:
        if row.num_tokens != 1 or row.sample is None:
            return None
        if row.targets or row.embed is not None:
            return None
    # A decode row is a token too: buffers hold max_step_tokens of them.
    most = min(unit.max_rows, unit.max_step_tokens)
    return next(size for size in buckets(most) if size >= len(plan.rows))


def fill_up(buffers: Buffers, rows: int, bucket: int) -> None:
    """Rows of no request behind the plan's: no position, slot 0, nothing to store or to see."""
    for name, dtype, value in (
        ("token_ids", "int64", 0),
        ("positions", "int64", -1),
        ("row_starts", "int32", -1),
        ("slots", "int64", 0),
    ):
        at, size = buffers.places[name]
        buffers.host_np[at : at + size].view(dtype)[rows:bucket] = value


def fill_lora(buffers: Buffers, plan: LoraPlan, bucket: int) -> None:
    """The adapters' part of a step of decode rows, filled up with blocks of no token."""
    blocks = [*plan.blocks, *[0] * (3 * bucket - len(plan.blocks))]
    buffers.fill("lora_tokens", plan.tokens, np.int64)
    buffers.fill("lora_blocks", blocks, np.int64)


@dataclass
class _Kind:
    """Steps that share a graph, once there is one."""

    model: BoundModel
    batch: ForwardBatch
    lora: LoraBatch | None
    logits_BV: torch.Tensor
    graph: Any = None
    keep: list[torch.Tensor] = field(default_factory=list)
    """Scratch that the graph writes."""


class DecodeGraphs:
    """The graphs of one lane. All methods are called with the lane's stream in use."""

    def __init__(
        self,
        unit: UnitSpec,
        device: torch.device,
        attention: HeadsBackend,
        lora: LoraOps,
        *,
        enabled: bool,
    ) -> None:
        """attention: an object of its own, whose scratch no other step touches. lora: one that
        goes by `LoraBatch.blocks_B3`. Not enabled: steps are filled up all the same, and nothing
        is captured (the same bits, launch by launch)."""
        self._unit = unit
        self._attention = attention
        self._lora = lora
        self._enabled = enabled
        self._inputs = Buffers(unit, device)
        self._each = torch.arange(unit.max_rows + 1, device=device)
        self._each32 = self._each.to(torch.int32)
        self._ones32 = torch.ones(unit.max_rows, dtype=torch.int32, device=device)
        self._logits: torch.Tensor | None = None
        self._kinds: dict[tuple[str, int, int, tuple[int, ...]], _Kind] = {}
        self.count = 0
        """Kinds of steps with a graph."""
        self._pool: Any = None

    def forward(self, step: Step, before_layer: Callable[[int], None] | None) -> torch.Tensor:
        """Logits [R, V] of the step's next iteration, valid until the next call. Its buffers are
        filled up."""
        model, bucket = step.model, step.bucket
        assert bucket is not None
        longest = max(step.row_starts) + step.launched + 1
        kind = self._kind(model, bucket, longest, step.lora_caps)
        self._inputs.on_device.copy_(step.buffers.on_device, non_blocking=True)
        if before_layer is not None or kind.graph is None:
            self._eager(kind, before_layer)
            if self._enabled and before_layer is None and self.count < MAX_GRAPHS:
                self._capture(kind)
        else:
            kind.graph.replay()
        return kind.logits_BV[: len(step.plan.rows), : model.arch.vocab_size]

    def forget(self, model: BoundModel) -> None:
        """Nothing of it is in flight any more."""
        for key in [key for key, kind in self._kinds.items() if kind.model is model]:
            self.count -= self._kinds[key].graph is not None
            del self._kinds[key]

    def _kind(self, model: BoundModel, bucket: int, longest: int, caps: tuple[int, ...]) -> _Kind:
        most = model.page_table.shape[1] * model.spec.page_tokens
        longest = next((size for size in LONGEST if size >= longest), most)
        key = (model.spec.name, bucket, longest, caps)
        kind = self._kinds.get(key)
        if kind is None or kind.model is not model:
            kind = self._kinds[key] = self._make(model, bucket, longest, caps)
        return kind

    def _make(self, model: BoundModel, bucket: int, longest: int, caps: tuple[int, ...]) -> _Kind:
        view = self._inputs.view
        batch = ForwardBatch(
            token_ids=view("token_ids", bucket),
            positions=view("positions", bucket),
            token_rows=self._each[:bucket],
            row_offsets=self._each32[: bucket + 1],
            row_starts=view("row_starts", bucket, torch.int32),
            row_tokens=self._ones32[:bucket],
            slots=view("slots", bucket),
            page_table=model.page_table,
            sample_tokens=self._each[:bucket],
            starts=(longest - 1,) * bucket,
            num_tokens=(1,) * bucket,
        )
        lora = None
        if any(caps):
            blocks = view("lora_blocks", 3 * bucket).view(bucket, 3)
            widths = (caps,) * model.arch.num_layers
            lora = LoraBatch((), view("lora_tokens", bucket), blocks, widths, self._lora)
        return _Kind(model, batch, lora, self._logits_of(model, bucket))

    def _logits_of(self, model: BoundModel, bucket: int) -> torch.Tensor:
        """All kinds share one piece of memory; an earlier, smaller one lives on in its graphs."""
        vocab, dtype = model.decoder.logits_width, model.decoder.dtype
        need = bucket * vocab * dtype.itemsize
        if self._logits is None or self._logits.numel() < need:
            rows = self._unit.max_rows
            size = rows * vocab * dtype.itemsize
            self._logits = torch.empty(size, dtype=torch.uint8, device=self._each.device)
        return self._logits[:need].view(dtype).view(bucket, vocab)

    def _eager(self, kind: _Kind, before_layer: Callable[[int], None] | None = None) -> None:
        model = kind.model
        self._attention.plan(kind.batch, model.kv)
        model.decoder.forward(
            kind.batch,
            self._attention,
            model.kv,
            before_layer,
            kind.lora,
            logits_out=kind.logits_BV,
        )

    def _capture(self, kind: _Kind) -> None:
        """Nothing runs meanwhile; the step was done already. About 10 ms."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads go on copying and mapping meanwhile: only this one's calls count.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._eager(kind)
            finally:
                graph.capture_end()
        except RuntimeError as error:
            self._enabled = False
            log.warning("decode steps run without CUDA graphs: %s", error)
            return
        kind.graph = graph
        kind.keep = self._attention.scratch()
        self.count += 1

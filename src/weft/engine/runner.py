"""StepPlan -> tensors -> Decoder.forward -> sampler -> tokens, on any device.

Everything a step needs goes to the device in one or two copies from a staging buffer with fixed
places, so addresses (and alignment, hence bits) do not depend on the plan. What a request carries
from step to step stays on the device: its row of the model's page table and its last token. No
host synchronisation happens here: `iterate` only launches, and tokens are copied to the host
asynchronously; the executor says when they have arrived.

Shape legend: T tokens of a step, R rows, S sampling rows, K stop ids, N slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weft.attention.base import AttentionBackend, ForwardBatch, KvView
from weft.core.actions import Row, StepPlan
from weft.core.model import Architecture, ModelSpec
from weft.core.unit import UnitSpec
from weft.engine.base import ImageRef
from weft.engine.sampler import SamplingBatch, sample, signed64
from weft.memory.base import Arena
from weft.models.decoder import Decoder
from weft.models.layout import ImageLayout, image_layout

LogitsTap = Callable[[StepPlan, int, torch.Tensor], None]
"""(plan, iteration, clone of logits [S, V]): for tests that compare bits."""

Sampler = Callable[[torch.Tensor, SamplingBatch], torch.Tensor]
"""(logits [S, V], parameters) -> int64 [S]."""

ALIGN_WORDS = 32
"""Sections of a staging buffer begin at multiples of this many 8-byte words."""
NO_TOKEN = -1


@dataclass(frozen=True)
class BoundModel:
    """A model an executor knows: views over its two ranges and its device-side row state."""

    spec: ModelSpec
    arch: Architecture
    image: ImageRef
    layout: ImageLayout
    decoder: Decoder
    weights_bytes: torch.Tensor
    """uint8 over the whole weight range."""
    kv_bytes: torch.Tensor
    """uint8 over the whole KV range."""
    kv: KvView
    page_table: torch.Tensor
    """int32 [N, pages of the longest context that the arena can hold]: page ids of each slot."""


def kv_range_bytes(unit: UnitSpec) -> int:
    """Size of every model's virtual KV range: as many granules as the arena has."""
    return unit.num_granules * unit.granule_bytes


def bind_model(
    arena: Arena,
    unit: UnitSpec,
    spec: ModelSpec,
    arch: Architecture,
    image: ImageRef,
    make_decoder: Callable[..., Decoder] = Decoder,
) -> BoundModel:
    """Reserve the ranges of a model and make the views over them. Reads nothing that is mapped.

    Raises ValueError if spec, architecture and image do not fit together, ArenaError if the name
    is bound already or there is no address space.
    """
    layout = image_layout(arch)
    if image.num_bytes != layout.num_bytes or spec.weight_bytes != layout.num_bytes:
        raise ValueError(
            f"{spec.name}: the image has {image.num_bytes} bytes and the spec {spec.weight_bytes}, "
            f"the architecture needs {layout.num_bytes}"
        )
    if spec.page_bytes != spec.page_tokens * arch.kv_bytes_per_token:
        raise ValueError(f"{spec.name}: page_bytes {spec.page_bytes} do not fit the architecture")
    arena.reserve(spec.name, layout.num_bytes, kv_range_bytes(unit))
    try:
        weights = arena.tensor(spec.name, "weights")
        kv_bytes = arena.tensor(spec.name, "kv")
        # No request is longer than the pages there are, however long a context config.json claims.
        asked = -(-spec.max_context_tokens // spec.page_tokens)
        max_pages = max(1, min(asked, kv_bytes.numel() // spec.page_bytes))
        max_tokens = min(spec.max_context_tokens, max_pages * spec.page_tokens)
        decoder = make_decoder(
            arch, weights, max_tokens=max_tokens, context_tokens=spec.max_context_tokens
        )
        return BoundModel(
            spec=spec,
            arch=arch,
            image=image,
            layout=layout,
            decoder=decoder,
            weights_bytes=weights,
            kv_bytes=kv_bytes,
            kv=decoder.kv_view(kv_bytes, spec.page_tokens),
            page_table=torch.zeros(
                (unit.num_slots, max_pages), dtype=torch.int32, device=weights.device
            ),
        )
    except BaseException:
        arena.release(spec.name)
        raise


def check_plan(plan: StepPlan, model: BoundModel, unit: UnitSpec) -> None:
    """Refuse a plan that would read or write where it must not. Raises ValueError."""
    rows = plan.rows
    if not 1 <= len(rows) <= unit.max_rows:
        raise ValueError(f"{len(rows)} rows; a step has 1 .. {unit.max_rows}")
    total = sum(row.num_tokens for row in rows)
    if total > unit.max_step_tokens:
        raise ValueError(f"{total} tokens; a step has at most {unit.max_step_tokens}")
    if len({row.slot for row in rows}) != len(rows):
        raise ValueError("two rows of a step share a slot")
    if plan.repeat < 1:
        raise ValueError(f"repeat is {plan.repeat}")
    for row in rows:
        _check_row(row, plan.repeat, model, unit)
        if plan.repeat > 1 and (row.num_tokens != 1 or row.sample is None):
            raise ValueError(f"request {row.request}: only sampling decode rows can be repeated")


def _check_row(row: Row, repeat: int, model: BoundModel, unit: UnitSpec) -> None:
    who, max_pages = f"request {row.request}", model.page_table.shape[1]
    if not 0 <= row.slot < unit.num_slots:
        raise ValueError(f"{who}: slot {row.slot} is outside 0 .. {unit.num_slots - 1}")
    if row.num_tokens < 1 or row.start < 0:
        raise ValueError(f"{who}: {row.num_tokens} tokens from position {row.start}")
    end = row.start + row.num_tokens + repeat - 1
    longest = min(model.spec.max_context_tokens, max_pages * model.spec.page_tokens)
    if end > longest:
        raise ValueError(f"{who}: position {end} is beyond {longest}")
    if row.input is None:
        if row.num_tokens != 1:
            raise ValueError(f"{who}: a row without input ids has one token")
    elif len(row.input) != row.num_tokens:
        raise ValueError(f"{who}: {len(row.input)} input ids for {row.num_tokens} tokens")
    elif not 0 <= min(row.input) <= max(row.input) < model.arch.vocab_size:
        raise ValueError(f"{who}: a token id is outside 0 .. {model.arch.vocab_size - 1}")
    if row.append_pages:
        if row.first_page < 0 or row.first_page + len(row.append_pages) > max_pages:
            raise ValueError(f"{who}: page table entries beyond {max_pages}")
        if not 0 <= min(row.append_pages) <= max(row.append_pages) < model.kv.pages.shape[0]:
            raise ValueError(f"{who}: a page id is outside 0 .. {model.kv.pages.shape[0] - 1}")
    if row.targets or row.embed is not None:
        raise ValueError(f"{who}: scores of prompts and embeddings are not computed yet")
    if row.adapter is not None:
        raise ValueError(f"{who}: adapters are not supported yet")


class _Buffers:
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
            "seed": rows,
            "output_index": rows,
            "min_remaining": rows,
        }
        self.device = device
        self.places: dict[str, tuple[int, int]] = {}
        at = 0
        for name, size in sizes.items():
            self.places[name] = (at, size)
            at += -(-size // ALIGN_WORDS) * ALIGN_WORDS
        self.host, self.on_device = self._pair(at)
        self.host_np = self.host.numpy()
        self.extra_host, self.extra_device = self._pair(1024)
        self.tokens = torch.full(
            (max(1, unit.max_repeat), rows),
            NO_TOKEN,
            dtype=torch.int64,
            pin_memory=device.type == "cuda",
        )
        """int64 [max_repeat, R] on the host: drawn tokens, sampling rows first to last."""
        self.in_use = False

    def _pair(self, words: int) -> tuple[torch.Tensor, torch.Tensor]:
        pinned = self.device.type == "cuda"
        host = torch.zeros(words, dtype=torch.int64, pin_memory=pinned)
        return host, host if not pinned else torch.zeros_like(host, device=self.device)

    def reserve_extra(self, words: int) -> None:
        """Room for page table entries and stop ids. Only while no step in flight uses these."""
        if words > self.extra_host.numel():
            self.extra_host, self.extra_device = self._pair(1 << (words - 1).bit_length())

    def fill(self, name: str, values: Sequence[int] | Sequence[float], dtype: type) -> None:
        at, size = self.places[name]
        self.host_np[at : at + size].view(dtype)[: len(values)] = values

    def view(self, name: str, count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        at, size = self.places[name]
        return self.on_device[at : at + size].view(dtype)[:count]

    def upload(self, extra_words: int) -> None:
        if self.on_device is not self.host:
            self.on_device.copy_(self.host, non_blocking=True)
            if extra_words:
                self.extra_device[:extra_words].copy_(
                    self.extra_host[:extra_words], non_blocking=True
                )


class Step:
    """One plan being executed. Made by `Runner.prepare`; `release` gives its buffers back."""

    def __init__(self, plan: StepPlan, model: BoundModel, buffers: _Buffers) -> None:
        self.plan = plan
        self.model = model
        self.launched = 0
        """Iterations launched so far."""
        self._buffers = buffers
        self._sampling_rows = [j for j, row in enumerate(plan.rows) if row.sample is not None]
        self.row_starts = tuple(row.start for row in plan.rows)
        self.row_tokens = tuple(row.num_tokens for row in plan.rows)
        self.sampling: SamplingBatch | None = None

    def tokens(self, iteration: int) -> tuple[int, ...]:
        """The token each row drew, NO_TOKEN where none. Only after the copy has arrived."""
        drawn = self._buffers.tokens[iteration, : len(self._sampling_rows)].tolist()
        out = [NO_TOKEN] * len(self.plan.rows)
        for j, token in zip(self._sampling_rows, drawn, strict=True):
            out[j] = token
        return tuple(out)

    def release(self) -> None:
        """The device has finished every launched iteration: the buffers may be written again."""
        self._buffers.in_use = False


class Runner:
    """Executes the steps of one lane, in order. Called by one thread at a time, on the stream on
    which the lane's work is to run."""

    def __init__(
        self,
        unit: UnitSpec,
        device: torch.device,
        attention: AttentionBackend,
        last_token: torch.Tensor,
        *,
        sampler: Sampler = sample,
        logits_tap: LogitsTap | None = None,
    ) -> None:
        """last_token: int64 [N] on the device, shared by the lanes of a unit. sampler: see
        `engine.sampler.sample`, whose meaning it must have."""
        self._unit = unit
        self._device = device
        self._attention = attention
        self._last_token = last_token
        self._sampler = sampler
        self._tap = logits_tap
        # depth steps in flight and the one being prepared.
        self._ring = [_Buffers(unit, device) for _ in range(unit.depth + 1)]

    @torch.inference_mode()
    def prepare(self, model: BoundModel, plan: StepPlan) -> Step:
        """Check the plan, upload its inputs and write its new page table entries.

        Raises ValueError for a plan that contradicts the unit or the model, RuntimeError if too
        many steps are unreleased; neither has any effect.
        """
        check_plan(plan, model, self._unit)
        if plan.repeat > self._ring[0].tokens.shape[0]:
            raise ValueError(f"repeat {plan.repeat} exceeds max_repeat {self._unit.max_repeat}")
        # Steps of different models need not end in the order they began: any free one will do.
        buffers = next((one for one in self._ring if not one.in_use), None)
        if buffers is None:
            raise RuntimeError("more steps in flight than the unit's depth")
        buffers.in_use = True
        step = Step(plan, model, buffers)
        try:
            self._stage_rows(step, buffers)
            num_pages, stop_width = self._stage_extra(step, buffers)
            buffers.upload(2 * num_pages + stop_width * len(step._sampling_rows))
            if num_pages:
                where = buffers.extra_device[:num_pages]
                pages = buffers.extra_device[num_pages : 2 * num_pages]
                model.page_table.view(-1).index_copy_(0, where, pages.to(torch.int32))
            step.sampling = self._sampling(step, buffers, 2 * num_pages, stop_width)
        except BaseException:
            step.release()
            raise
        return step

    @torch.inference_mode()
    def iterate(self, step: Step, before_layer: Callable[[int], None] | None = None) -> None:
        """Launch the next iteration: forward, draw, remember the tokens on the device, and copy
        them to the host (`step.tokens(i)` once the copy has arrived)."""
        iteration, plan, buffers = step.launched, step.plan, step._buffers
        rows = len(plan.rows)
        if iteration:
            self._advance(step, buffers)
        else:
            gathered = sum(row.input is None for row in plan.rows)
            if gathered:
                slots = buffers.view("gather_slots", gathered)
                buffers.view("token_ids", sum(step.row_tokens)).index_copy_(
                    0, buffers.view("gather_tokens", gathered), self._last_token[slots]
                )
        batch = self._batch(step, buffers, rows)
        model = step.model
        self._attention.plan(batch, model.kv)
        logits_SV = model.decoder.forward(batch, self._attention, model.kv, before_layer)
        if self._tap is not None:
            self._tap(plan, iteration, logits_SV.clone())
        if step.sampling is not None:
            drawn = self._sampler(logits_SV, step.sampling)
            count = len(step._sampling_rows)
            self._last_token.index_copy_(0, buffers.view("sample_slots", count), drawn)
            buffers.tokens[iteration, :count].copy_(drawn, non_blocking=True)
        step.launched += 1

    def _advance(self, step: Step, buffers: _Buffers) -> None:
        """A repeated step holds decode rows only: one token a row, in row order."""
        rows = len(step.plan.rows)
        torch.index_select(
            self._last_token, 0, buffers.view("slots", rows), out=buffers.view("token_ids", rows)
        )
        buffers.view("positions", rows).add_(1)
        buffers.view("row_starts", rows, torch.int32).add_(1)
        if step.sampling is not None:
            step.sampling.advance_()

    def _stage_rows(self, step: Step, buffers: _Buffers) -> None:
        ids: list[int] = []
        positions: list[int] = []
        token_rows: list[int] = []
        offsets, gather, sample_tokens = [0], [], []
        for j, row in enumerate(step.plan.rows):
            if row.input is None:
                gather.append(len(ids))
            ids.extend((0,) if row.input is None else row.input)
            positions.extend(range(row.start, row.start + row.num_tokens))
            token_rows.extend([j] * row.num_tokens)
            offsets.append(len(ids))
            if row.sample is not None:
                sample_tokens.append(len(ids) - 1)
        rows = step.plan.rows
        sampling = [rows[j] for j in step._sampling_rows]
        settings = [row.sample for row in sampling if row.sample is not None]
        fill = buffers.fill
        fill("token_ids", ids, np.int64)
        fill("positions", positions, np.int64)
        fill("token_rows", token_rows, np.int64)
        fill("row_offsets", offsets, np.int32)
        fill("row_starts", step.row_starts, np.int32)
        fill("row_tokens", step.row_tokens, np.int32)
        fill("slots", [row.slot for row in rows], np.int64)
        fill("sample_tokens", sample_tokens, np.int64)
        fill("sample_slots", [row.slot for row in sampling], np.int64)
        fill("gather_tokens", gather, np.int64)
        fill("gather_slots", [row.slot for row in rows if row.input is None], np.int64)
        fill("temperature", [s.temperature for s in settings], np.float64)
        fill("top_p", [s.top_p for s in settings], np.float64)
        fill("top_k", [s.top_k for s in settings], np.int64)
        fill("seed", [signed64(s.seed) for s in settings], np.int64)
        fill("output_index", [row.output_index for row in sampling], np.int64)
        fill("min_remaining", [row.min_remaining for row in sampling], np.int64)

    def _stage_extra(self, step: Step, buffers: _Buffers) -> tuple[int, int]:
        """Page table entries (places, then ids), then stop ids where any are masked.

        Returns the number of entries and the stop ids a sampling row (0 where none is masked).
        """
        width = step.model.page_table.shape[1]
        places: list[int] = []
        pages: list[int] = []
        for row in step.plan.rows:
            first = row.slot * width + row.first_page
            places.extend(range(first, first + len(row.append_pages)))
            pages.extend(row.append_pages)
        sampling = [step.plan.rows[j] for j in step._sampling_rows]
        masked = any(row.min_remaining > 0 for row in sampling)
        stop_width = max((len(row.stop_ids) for row in sampling), default=0) if masked else 0
        words = places + pages
        for row in sampling if stop_width else ():
            words.extend(row.stop_ids)
            words.extend([NO_TOKEN] * (stop_width - len(row.stop_ids)))
        buffers.reserve_extra(len(words))
        buffers.extra_host.numpy()[: len(words)] = words
        return len(pages), stop_width

    def _sampling(
        self, step: Step, buffers: _Buffers, stops_at: int, stop_width: int
    ) -> SamplingBatch | None:
        count = len(step._sampling_rows)
        if not count:
            return None
        rows = [step.plan.rows[j] for j in step._sampling_rows]
        settings = [row.sample for row in rows if row.sample is not None]
        stops = buffers.extra_device[stops_at : stops_at + count * stop_width]
        random = [s for s in settings if not s.greedy]
        return SamplingBatch(
            temperature=buffers.view("temperature", count, torch.float64),
            top_p=buffers.view("top_p", count, torch.float64),
            top_k=buffers.view("top_k", count),
            seed=buffers.view("seed", count),
            output_index=buffers.view("output_index", count),
            stop_ids=stops.view(count, stop_width),
            min_remaining=buffers.view("min_remaining", count),
            any_random=bool(random),
            any_truncated=any(s.top_k > 0 or s.top_p < 1.0 for s in random),
            any_masked=stop_width > 0,
        )

    def _batch(self, step: Step, buffers: _Buffers, rows: int) -> ForwardBatch:
        total = sum(step.row_tokens)
        done = step.launched
        return ForwardBatch(
            token_ids=buffers.view("token_ids", total),
            positions=buffers.view("positions", total),
            token_rows=buffers.view("token_rows", total),
            row_offsets=buffers.view("row_offsets", rows + 1, torch.int32),
            row_starts=buffers.view("row_starts", rows, torch.int32),
            row_tokens=buffers.view("row_tokens", rows, torch.int32),
            slots=buffers.view("slots", rows),
            page_table=step.model.page_table,
            sample_tokens=buffers.view("sample_tokens", len(step._sampling_rows)),
            starts=tuple(start + done for start in step.row_starts),
            num_tokens=step.row_tokens,
        )

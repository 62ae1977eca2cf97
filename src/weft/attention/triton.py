"""The Triton attention backend: paged, any head dim, MHA, GQA and MQA, float16/bfloat16/float32.

Rows of one token go to the decode kernel, cut over their keys when the batch is small; longer rows
go to the chunk kernel. Both write into one output.
"""

from dataclasses import dataclass

import torch

from weft.attention.base import ForwardBatch, KvView
from weft.kernels.elementwise import store_kv
from weft.kernels.paged_attention import (
    ChunkBlocks,
    chunk_attention,
    chunk_block_tokens,
    cut_chunks,
    decode_attention,
    decode_splits,
)

__all__ = ["TritonAttention"]


@dataclass(frozen=True)
class _DecodeRows:
    slot: torch.Tensor
    start: torch.Tensor
    query: torch.Tensor
    """Index of the row's token in the step."""
    longest: int


@dataclass(frozen=True)
class _Plan:
    batch: ForwardBatch
    decode: _DecodeRows | None
    chunks: ChunkBlocks | None


class TritonAttention:
    """Implements `attention.base.AttentionBackend` on CUDA. One object per lane.

    num_q_heads and num_kv_heads decide how rows are cut, so an object serves one model shape.
    `splits` fixes the number of cuts (tests); by default it follows from the plan's shape.
    """

    def __init__(
        self,
        num_q_heads: int,
        num_kv_heads: int,
        *,
        splits: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._group = num_q_heads // num_kv_heads
        self._splits = splits
        self._num_sms = 132
        if device is not None and device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._plan: _Plan | None = None
        self._partial: torch.Tensor | None = None
        self._partial_lse: torch.Tensor | None = None

    def plan(self, batch: ForwardBatch, kv: KvView) -> None:
        if all(count == 1 for count in batch.num_tokens):
            decode = _DecodeRows(
                batch.slots,
                batch.row_starts,
                batch.row_offsets,
                max(batch.starts, default=0) + 1,
            )
            self._plan = _Plan(batch, decode, None)
            return
        self._plan = self._plan_mixed(batch, kv)

    def _plan_mixed(self, batch: ForwardBatch, kv: KvView) -> _Plan:
        """Upload where the decode rows and the blocks of the chunks are, in one copy."""
        singles: list[int] = []
        chunks: list[tuple[int, int, int, int]] = []
        token = longest = 0
        for row, (start, count) in enumerate(zip(batch.starts, batch.num_tokens, strict=True)):
            if count == 1:
                singles.append(row)
                longest = max(longest, start + 1)
            elif count > 1:
                chunks.append((row, start, token, count))
            token += count
        head_dim, itemsize = kv.pages.shape[5], kv.pages.element_size()
        cut = cut_chunks(chunks, chunk_block_tokens(self._group, head_dim, itemsize))
        columns = torch.tensor([*singles, *(x for column in cut for x in column)])
        device = batch.positions.device
        if device.type == "cuda":
            columns = columns.pin_memory()
        columns = columns.to(device, non_blocking=True)
        rows, blocks = columns[: len(singles)], columns[len(singles) :].view(4, -1)
        decode = None
        if singles:
            decode = _DecodeRows(
                batch.slots[rows], batch.row_starts[rows], batch.row_offsets[rows], longest
            )
        slot = batch.slots[blocks[0]]
        return _Plan(batch, decode, ChunkBlocks(slot, blocks[1], blocks[2], blocks[3]))

    def run(
        self,
        layer: int,
        q_TQD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        kv: KvView,
    ) -> torch.Tensor:
        assert self._plan is not None, "plan() was not called"
        batch, decode, chunks = self._plan.batch, self._plan.decode, self._plan.chunks
        pages = kv.pages[:, layer]
        store_kv(
            k_TGD, v_TGD, pages, batch.positions, batch.token_rows, batch.slots, batch.page_table
        )
        out_TQD = torch.empty(q_TQD.shape, dtype=q_TQD.dtype, device=q_TQD.device)
        scale = q_TQD.shape[2] ** -0.5
        if decode is not None:
            rows = decode.slot.shape[0]
            splits = self._splits or decode_splits(
                rows, k_TGD.shape[1], decode.longest, num_sms=self._num_sms
            )
            self._reserve(rows * splits * q_TQD.shape[1], q_TQD.shape[2], q_TQD.device)
            decode_attention(
                q_TQD,
                pages,
                batch.page_table,
                decode.slot,
                decode.start,
                decode.query,
                out_TQD,
                scale=scale,
                splits=splits,
                partial=self._partial,
                partial_lse=self._partial_lse,
            )
        if chunks is not None:
            chunk_attention(q_TQD, pages, batch.page_table, chunks, out_TQD, scale=scale)
        return out_TQD

    def _reserve(self, pieces: int, head_dim: int, device: torch.device) -> None:
        """Scratch for partial results, kept between steps (its address is stable then)."""
        if self._partial_lse is None or self._partial_lse.numel() < pieces:
            self._partial = torch.empty(pieces * head_dim, dtype=torch.float32, device=device)
            self._partial_lse = torch.empty(pieces, dtype=torch.float32, device=device)

"""The Triton attention backend: paged, any head dim, MHA, GQA and MQA, float16/bfloat16/float32.

Rows of one token go to the decode kernel, cut over their keys when the batch is small; longer rows
go to the chunk kernel. Both write into one output.
"""

from dataclasses import dataclass

import torch

from weft.attention.base import (
    PLAIN_ATTENTION,
    AttentionParams,
    ForwardBatch,
    HeadNorms,
    KvView,
)
from weft.kernels.elementwise import store_kv
from weft.kernels.heads import split_heads
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


class TritonAttention:
    """Implements `attention.base.HeadsBackend` on CUDA. One object per lane, for all models.

    `splits` fixes how often the keys of decode rows are cut (tests); by default it follows from
    the plan's shape.
    """

    def __init__(self, *, splits: int | None = None, num_sms: int = 132) -> None:
        self._splits = splits
        self._num_sms = num_sms
        self._batch: ForwardBatch | None = None
        self._decode: _DecodeRows | None = None
        self._chunks: ChunkBlocks | None = None
        self._cut = False
        self._partial: torch.Tensor | None = None
        self._partial_lse: torch.Tensor | None = None

    def plan(self, batch: ForwardBatch, kv: KvView) -> None:
        self._batch, self._decode, self._chunks = batch, None, None
        self._cut = all(count == 1 for count in batch.num_tokens)
        if self._cut:
            longest = max(batch.starts, default=0) + 1
            self._decode = _DecodeRows(batch.slots, batch.row_starts, batch.row_offsets, longest)

    def _cut_rows(self, batch: ForwardBatch, group: int, head_dim: int, itemsize: int) -> None:
        """Upload where the decode rows and the blocks of the chunks are, in one copy. Waits for
        the first layer: how a chunk is cut depends on the query heads of a KV head."""
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
        cut = cut_chunks(chunks, chunk_block_tokens(group, head_dim, itemsize))
        columns = torch.tensor([*singles, *(x for column in cut for x in column)])
        device = batch.positions.device
        if device.type == "cuda":
            columns = columns.pin_memory().to(device, non_blocking=True)
        rows, blocks = columns[: len(singles)], columns[len(singles) :].view(4, -1)
        if singles:
            self._decode = _DecodeRows(
                batch.slots[rows], batch.row_starts[rows], batch.row_offsets[rows], longest
            )
        self._chunks = ChunkBlocks(batch.slots[blocks[0]], blocks[1], blocks[2], blocks[3])
        self._cut = True

    def run(
        self,
        layer: int,
        q_TQD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        kv: KvView,
        params: AttentionParams = PLAIN_ATTENTION,
    ) -> torch.Tensor:
        batch = self._batch
        assert batch is not None, "plan() was not called"
        pages = kv.pages[:, layer]
        store_kv(
            k_TGD, v_TGD, pages, batch.positions, batch.token_rows, batch.slots, batch.page_table
        )
        return self._attend(q_TQD, pages, params)

    def run_heads(
        self,
        layer: int,
        heads_TGXD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        norms: HeadNorms | None,
        kv: KvView,
        params: AttentionParams = PLAIN_ATTENTION,
    ) -> torch.Tensor:
        batch = self._batch
        assert batch is not None, "plan() was not called"
        pages = kv.pages[:, layer]
        q_TQD = split_heads(
            heads_TGXD,
            *rope,
            pages,
            batch.positions,
            batch.token_rows,
            batch.slots,
            batch.page_table,
            norms=None if norms is None else (norms.query_D, norms.key_D),
            eps=0.0 if norms is None else norms.eps,
            norm_offset=0.0 if norms is None else norms.offset,
        )
        return self._attend(q_TQD, pages, params)

    def _attend(
        self, q_TQD: torch.Tensor, pages: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """K and V of the step are in `pages`, one layer's view of the pool."""
        batch, kv_heads = self._batch, pages.shape[3]
        assert batch is not None
        if not self._cut:
            group = q_TQD.shape[1] // kv_heads
            self._cut_rows(batch, group, q_TQD.shape[2], q_TQD.element_size())
        decode, chunks = self._decode, self._chunks
        out_TQD = torch.empty(q_TQD.shape, dtype=q_TQD.dtype, device=q_TQD.device)
        how = {
            "scale": q_TQD.shape[2] ** -0.5 if params.scale is None else params.scale,
            "window": params.window,
            "cap": params.cap,
        }
        if decode is not None:
            rows = decode.slot.shape[0]
            seen = min(decode.longest, params.window or decode.longest)
            splits = self._splits or decode_splits(rows, kv_heads, seen, num_sms=self._num_sms)
            if splits > 1:
                self._reserve(rows * splits * q_TQD.shape[1], q_TQD.shape[2], q_TQD.device)
            decode_attention(
                q_TQD,
                pages,
                batch.page_table,
                decode.slot,
                decode.start,
                decode.query,
                out_TQD,
                splits=splits,
                partial=self._partial,
                partial_lse=self._partial_lse,
                **how,
            )
        if chunks is not None:
            chunk_attention(q_TQD, pages, batch.page_table, chunks, out_TQD, **how)
        return out_TQD

    def scratch(self) -> list[torch.Tensor]:
        """What `run` writes besides its result: a graph of it must keep these alive."""
        return [one for one in (self._partial, self._partial_lse) if one is not None]

    def _reserve(self, pieces: int, head_dim: int, device: torch.device) -> None:
        """Scratch for partial results, kept between steps (its address is stable then)."""
        if self._partial is None or self._partial.numel() < pieces * head_dim:
            self._partial = torch.empty(pieces * head_dim, dtype=torch.float32, device=device)
        if self._partial_lse is None or self._partial_lse.numel() < pieces:
            self._partial_lse = torch.empty(pieces, dtype=torch.float32, device=device)

"""The contract between decoder, runner and attention backends.

Shape legend: T tokens of the step, R rows, Q query heads, G KV heads, D head dim, P pages,
S tokens a page, N slots, L layers.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class ForwardBatch:
    """One step's inputs. All tensors lie on the model's device and may be preallocated buffers;
    nothing reads them on the host. Tokens are ordered by row: row r owns tokens
    row_offsets[r] .. row_offsets[r + 1] - 1, at positions starts[r], starts[r] + 1, ...

    The two host tuples say the same as row_starts and row_tokens did when the step was planned;
    they serve backends that lay out work on the host (reference; launch grids).
    """

    token_ids: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int64 [T]: position of each token in its request."""
    token_rows: torch.Tensor
    """int64 [T]: row of each token."""
    row_offsets: torch.Tensor
    """int32 [R + 1]: first token of each row, and T."""
    row_starts: torch.Tensor
    """int32 [R]: tokens of the request already in the KV pool."""
    row_tokens: torch.Tensor
    """int32 [R]: tokens of this step; after it, row_starts + row_tokens are in the pool."""
    slots: torch.Tensor
    """int64 [R]: row of page_table that belongs to each row."""
    page_table: torch.Tensor
    """int32 [N, max_pages]: page ids of each slot; entries past a row's last page are garbage."""
    sample_tokens: torch.Tensor
    """int64 [number of sampling rows]: index in 0 .. T-1 of each token whose logits are wanted."""
    starts: tuple[int, ...]
    """Host copy of row_starts."""
    num_tokens: tuple[int, ...]
    """Host copy of row_tokens."""


@dataclass(frozen=True)
class KvView:
    """A model's KV range as a tensor. Pages that no live request owns may be unmapped: nobody may
    touch a page that is not in the part of a page table that a row of the step covers."""

    pages: torch.Tensor
    """[P, L, 2, S, G, D] in the model's dtype, contiguous; index 2: 0 is K (after rotary), 1 V."""

    @property
    def page_tokens(self) -> int:
        return self.pages.shape[3]

    @classmethod
    def over(
        cls,
        range_bytes: torch.Tensor,
        *,
        dtype: torch.dtype,
        num_layers: int,
        page_tokens: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> "KvView":
        """View the uint8 tensor of a whole virtual KV range; a rest smaller than a page is cut."""
        page_bytes = 2 * num_layers * page_tokens * num_kv_heads * head_dim * dtype.itemsize
        count = range_bytes.numel() // page_bytes
        flat = range_bytes[: count * page_bytes].view(dtype)
        return cls(flat.view(count, num_layers, 2, page_tokens, num_kv_heads, head_dim))


@dataclass(frozen=True)
class AttentionParams:
    """How a layer attends. Hashable; one object a layer, made once."""

    scale: float | None = None
    """Scores are multiplied by it; None: 1 / sqrt(D)."""
    window: int = 0
    """A token sees the last so many tokens, itself included; 0: all."""
    cap: float | None = None
    """Scaled scores s become cap * tanh(s / cap)."""


PLAIN_ATTENTION = AttentionParams()


class AttentionBackend(Protocol):
    """`plan` once per step, then `run` once per layer in order. One object per lane: a plan lives
    until the next one."""

    def plan(self, batch: ForwardBatch, kv: KvView) -> None:
        """Prepare whatever is the same in all layers. Does not touch KV data."""
        ...

    def run(
        self,
        layer: int,
        q_TQD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        kv: KvView,
        params: AttentionParams = PLAIN_ATTENTION,
    ) -> torch.Tensor:
        """Write the step's K (after rotary) and V into the pool, then attend causally: the token
        at position p of a row sees positions 0 .. p of that row, or the last `params.window` of
        them. Query head h reads KV head h // (Q / G). Returns [T, Q, D], contiguous.

        A row's result depends on its own tokens and cache alone.
        """
        ...


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of query and key heads before the rotary embedding (Qwen3, Gemma 3)."""

    query_D: torch.Tensor
    key_D: torch.Tensor
    eps: float
    offset: float


@runtime_checkable
class HeadsBackend(AttentionBackend, Protocol):
    """A backend that takes the fused QKV product as it is."""

    def run_heads(
        self,
        layer: int,
        heads_TGXD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        norms: HeadNorms | None,
        kv: KvView,
        params: AttentionParams = PLAIN_ATTENTION,
    ) -> torch.Tensor:
        """As norm, rotary embedding and `run` one after the other. heads [T, G, Q / G + 2, D]: per
        KV head its queries, its key, its value; rope: cos and sin tables [positions, E].

        Tokens at negative positions belong to no request and rows that start at -1 neither: nothing
        is stored for them, and what comes out for them has no meaning.
        """
        ...

    def scratch(self) -> list[torch.Tensor]:
        """What `run` writes besides its result and the pool: a graph of it keeps these alive."""
        ...


def token_places(batch: ForwardBatch, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 page [T] and offset in the page [T] of each of the step's tokens. For `plan`."""
    slot_T = batch.slots[batch.token_rows]
    page_T = batch.page_table[slot_T, batch.positions // page_tokens].to(torch.int64)
    return page_T, batch.positions % page_tokens


def store_kv(
    places: tuple[torch.Tensor, torch.Tensor],
    layer: int,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    kv: KvView,
) -> None:
    """Write K and V of the step's tokens at `places` (from `token_places`); the torch way."""
    kv.pages[:, layer, 0].index_put_(places, k_TGD)
    kv.pages[:, layer, 1].index_put_(places, v_TGD)

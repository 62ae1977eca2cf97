"""Reference attention in torch: every other backend is compared with this one.

Rows are computed together only with rows of the same shape: equally many tokens and a context in
the same bucket of lengths. So a row's result, to the bit, depends on its own tokens and cache
alone, never on its company in the batch nor on which pages hold its data.

Shape legend: n rows of a group, t tokens each, C padded context tokens, p pages of C, S tokens a
page, T tokens of the step, Q query heads, G KV heads, q = Q / G, D head dim.
"""

from dataclasses import dataclass, field

import torch

from weft.attention.base import (
    PLAIN_ATTENTION,
    AttentionParams,
    ForwardBatch,
    KvView,
    store_kv,
    token_places,
)

MIN_BUCKET_TOKENS = 64
MAX_DOUBLED_TOKENS = 512


@dataclass(frozen=True)
class _Group:
    num_rows: int
    num_tokens: int
    tokens: torch.Tensor | None
    """int64 [n * t]: the group's tokens in the step; None: all of them, in order."""
    pages: torch.Tensor
    """int64 [n * p]; past a row's last page that page again, never one that is not the row's."""
    ahead: torch.Tensor
    """int64 [n, 1, 1, t, C]: how many positions a key lies after the query; negative: before."""
    stale: torch.Tensor
    """bool [n, 1, C, 1]: positions that hold no K and V of the row."""
    masks: dict[int, torch.Tensor] = field(default_factory=dict)

    def hidden(self, window: int) -> torch.Tensor:
        """bool [n, 1, 1, t, C]: positions a token may not see. Made once per window."""
        if window not in self.masks:
            hidden = self.ahead > 0
            self.masks[window] = hidden | (self.ahead <= -window) if window else hidden
        return self.masks[window]


def bucket_pages(context_tokens: int, page_tokens: int) -> int:
    """Pages that a row's context is padded to: a power of two of tokens from 64 to 512, beyond
    that the next multiple of 512, and whole pages."""
    tokens = MIN_BUCKET_TOKENS
    while tokens < context_tokens and tokens < MAX_DOUBLED_TOKENS:
        tokens *= 2
    if tokens < context_tokens:
        tokens = -(-context_tokens // MAX_DOUBLED_TOKENS) * MAX_DOUBLED_TOKENS
    return -(-tokens // page_tokens)


class ReferenceAttention:
    """AttentionBackend in plain torch, on any device. Lays out work on the host: not for graphs."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None

    def plan(self, batch: ForwardBatch, kv: KvView) -> None:
        self._places = token_places(batch, kv.page_tokens)
        members: dict[tuple[int, int], list[int]] = {}
        for row, (start, count) in enumerate(zip(batch.starts, batch.num_tokens, strict=True)):
            key = (count, bucket_pages(start + count, kv.page_tokens))
            members.setdefault(key, []).append(row)
        self._groups = [
            _plan_group(batch, rows, count, pages, kv.page_tokens, whole=len(members) == 1)
            for (count, pages), rows in members.items()
        ]

    def run(
        self,
        layer: int,
        q_TQD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        kv: KvView,
        params: AttentionParams = PLAIN_ATTENTION,
    ) -> torch.Tensor:
        assert self._places is not None, "plan() comes first"
        store_kv(self._places, layer, k_TGD, v_TGD, kv)
        out_TQD: torch.Tensor | None = None
        for group in self._groups:
            if group.tokens is None:
                return _attend(group, layer, q_TQD, kv, params)
            if out_TQD is None:
                out_TQD = torch.empty_like(q_TQD, memory_format=torch.contiguous_format)
            out = _attend(group, layer, q_TQD.index_select(0, group.tokens), kv, params)
            out_TQD.index_copy_(0, group.tokens, out)
        assert out_TQD is not None, "a step has rows"
        return out_TQD


def _plan_group(
    batch: ForwardBatch, rows: list[int], count: int, pages: int, page_tokens: int, *, whole: bool
) -> _Group:
    device = batch.page_table.device
    starts_n = torch.tensor([batch.starts[r] for r in rows], device=device)
    lengths_n = starts_n + count
    tokens: torch.Tensor | None = None
    slots_n = batch.slots
    if not whole:
        rows_n = torch.tensor(rows, device=device)
        firsts_n = batch.row_offsets[rows_n].to(torch.int64)
        tokens = (firsts_n[:, None] + torch.arange(count, device=device)).flatten()
        slots_n = slots_n[rows_n]
    last_page_n = (lengths_n - 1) // page_tokens
    columns = torch.minimum(torch.arange(pages, device=device)[None], last_page_n[:, None])
    pages_np = batch.page_table[slots_n[:, None], columns].to(torch.int64)
    position_C = torch.arange(pages * page_tokens, device=device)
    query_nt = starts_n[:, None] + torch.arange(count, device=device)
    return _Group(
        num_rows=len(rows),
        num_tokens=count,
        tokens=tokens,
        pages=pages_np.flatten(),
        ahead=(position_C[None, None] - query_nt[:, :, None])[:, None, None],
        stale=(position_C[None] >= lengths_n[:, None])[:, None, :, None],
    )


def _attend(
    group: _Group, layer: int, q: torch.Tensor, kv: KvView, params: AttentionParams
) -> torch.Tensor:
    """[n * t, Q, D] queries -> [n * t, Q, D] outputs, contiguous."""
    rows, count, (heads, dim) = group.num_rows, group.num_tokens, q.shape[1:]
    kv_heads = kv.pages.shape[4]
    # [n * p, 2, S, G, D] -> [2, n * G, C, D]; the copy makes results independent of page ids.
    gathered = kv.pages[:, layer].index_select(0, group.pages)
    gathered = gathered.view(rows, -1, 2, kv.page_tokens, kv_heads, dim)
    k, v = gathered.permute(2, 0, 4, 1, 3, 5).reshape(2, rows * kv_heads, -1, dim)
    context = k.shape[1]
    # What lies in stale places may be NaN, and 0 * NaN is not 0.
    v.view(rows, kv_heads, context, dim).masked_fill_(group.stale, 0)
    # [n, t, G, q, D] -> [n * G, q * t, D]
    q = q.view(rows, count, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(rows * kv_heads, -1, dim)
    scale = dim**-0.5 if params.scale is None else params.scale
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    if params.cap is not None:
        scores = scores.div_(params.cap).tanh_().mul_(params.cap)
    scores = scores.view(rows, kv_heads, -1, count, context)
    scores = scores.masked_fill_(group.hidden(params.window), float("-inf"))
    wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    out = torch.bmm(weights.view(rows * kv_heads, -1, context), v)
    out = out.view(rows, kv_heads, -1, count, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(rows * count, heads, dim).contiguous()

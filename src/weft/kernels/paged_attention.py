"""Attention over paged KV: launchers of the kernels in `paged_attention_jit`, and their twin.

Shapes: T tokens of the step, R rows, Q query heads, K KV heads, D head dim, P pages, N page
tokens, S splits. A layer's KV is a strided view [P, 2, N, K, D] of the pool
`[page][layer][K,V][token][kv head][head dim]`.

A row's result is a function of its own queries, keys and values and of the launch shape. Most of a
launcher is its list of arguments; that is why it is longer than functions elsewhere.
"""

from dataclasses import dataclass

import torch
import triton

from weft.kernels.paged_attention_jit import chunk_kernel, decode_kernel, merge_kernel

MAX_SPLITS = 64
DECODE_KEYS = 32
"""Keys that a program of the decode kernel loads at a time. 32 by one warp reach the memory's
bandwidth on Hopper from batch 128 on; 16 to 128 by 1 to 4 warps were tried."""


def decode_splits(rows: int, num_kv_heads: int, longest: int, *, num_sms: int = 132) -> int:
    """How many pieces each row's keys are cut into: 1 where the rows alone fill the device, up to
    MAX_SPLITS where one long row must. longest: most keys that a row sees. A function of the plan's
    shape only."""
    want = -(-4 * num_sms // (rows * num_kv_heads))
    return max(1, min(want, -(-longest // DECODE_KEYS), MAX_SPLITS))


@dataclass(frozen=True)
class ChunkBlocks:
    """Query blocks of the rows with more than one token, integers [blocks] each."""

    slot: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    count: torch.Tensor


def cut_chunks(
    rows: list[tuple[int, int, int, int]], block_tokens: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Cut rows (key, start, first token, tokens) into blocks: keys, positions, tokens, counts.

    Those with most keys come first, so that the longest programs do not start last.
    """
    cut = [
        (key, start + at, token + at, min(block_tokens, count - at))
        for key, start, token, count in rows
        for at in range(0, count, block_tokens)
    ]
    cut.sort(key=lambda block: -(block[1] + block[3]))
    key, position, token, count = zip(*cut, strict=True)
    return list(key), list(position), list(token), list(count)


def chunk_block_tokens(group: int, head_dim: int, itemsize: int) -> int:
    """Tokens of one row that a program of the chunk kernel works on."""
    return _chunk_block_m(group, head_dim, itemsize) // group


def _chunk_block_m(group: int, head_dim: int, itemsize: int) -> int:
    wanted = 128 if itemsize == 2 and head_dim <= 128 else 32
    return max(wanted, triton.next_power_of_2(group))


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def decode_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    page_table: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    cap: float | None = None,
    splits: int = 1,
    partial: torch.Tensor | None = None,
    partial_lse: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Rows of one token: row r is token query[r] of q [T, Q, D], at position start[r], with keys
    0 .. start[r] (the last `window` of them; 0: all) in the pages of page_table[slot[r]]. Writes
    out[query[r]] [T, Q, D]. Scaled scores s become cap * tanh(s / cap).

    kv [P, 2, N, K, D] strided; page_table int32 [slots, max_pages]; slot, start, query int32 [R].
    With splits > 1, `partial` float32 [>= R*S*Q*D] and `partial_lse` [>= R*S*Q] are scratch.
    lse: optional float32 [T, Q], natural logarithm.
    """
    rows = slot.shape[0]
    num_q_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads, page_tokens = kv.shape[3], kv.shape[2]
    group = num_q_heads // num_kv_heads
    block_d = _block_d(head_dim)
    whole = splits == 1
    if not whole:
        if partial is None or partial_lse is None:
            partial = torch.empty(
                rows * splits * num_q_heads * head_dim, dtype=torch.float32, device=q.device
            )
            partial_lse = torch.empty(
                rows * splits * num_q_heads, dtype=torch.float32, device=q.device
            )
        row_stride = splits * num_q_heads
    target = out if whole else partial
    target_lse = lse if whole else partial_lse
    decode_kernel[(rows, num_kv_heads, splits)](
        q,
        kv.data_ptr(),
        page_table,
        slot,
        start,
        query,
        target,
        target_lse if target_lse is not None else target,
        scale,
        cap or 0.0,
        window,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        kv.stride(2),
        kv.stride(1),
        page_table.stride(0),
        out.stride(0) if whole else row_stride * head_dim,
        0 if whole else num_q_heads * head_dim,
        out.stride(1) if whole else head_dim,
        (lse.stride(0) if lse is not None else 0) if whole else row_stride,
        0 if whole else num_q_heads,
        splits,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        BLOCK_N=DECODE_KEYS,
        BY_TOKEN=whole,
        HAS_LSE=target_lse is not None,
        ALIGNED=kv.data_ptr() % 16 == 0,
        HAS_WINDOW=window > 0,
        HAS_CAP=cap is not None,
        num_warps=1 if block_d <= 128 else 4,
        num_stages=3,
    )
    if whole:
        return
    merge_kernel[(rows, num_q_heads)](
        partial,
        partial_lse,
        query,
        out,
        lse if lse is not None else out,
        out.stride(0),
        out.stride(1),
        lse.stride(0) if lse is not None else 0,
        splits,
        Q_HEADS=num_q_heads,
        HEAD_DIM=head_dim,
        # Two kernels to compile instead of one for each power of two.
        BLOCK_S=16 if splits <= 16 else MAX_SPLITS,
        BLOCK_D=block_d,
        HAS_LSE=lse is not None,
        num_warps=4,
    )


def chunk_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    page_table: torch.Tensor,
    blocks: ChunkBlocks,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    cap: float | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Rows of several tokens, causal: block b is tokens token[b] .. token[b] + count[b] - 1 of
    q [T, Q, D], at positions position[b] .., of the row in slot[b], whose keys up to its own
    position are in the pool already. Writes out [T, Q, D] there; window, cap and lse as in
    decode_attention."""
    num_q_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads, page_tokens = kv.shape[3], kv.shape[2]
    group = num_q_heads // num_kv_heads
    block_d = _block_d(head_dim)
    half = q.element_size() == 2 and block_d <= 128
    chunk_kernel[(blocks.slot.shape[0], num_kv_heads)](
        q,
        kv.data_ptr(),
        page_table,
        blocks.slot,
        blocks.position,
        blocks.token,
        blocks.count,
        out,
        lse if lse is not None else out,
        scale,
        cap or 0.0,
        window,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        kv.stride(2),
        kv.stride(1),
        page_table.stride(0),
        out.stride(0),
        out.stride(1),
        lse.stride(0) if lse is not None else 0,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        BLOCK_M=_chunk_block_m(group, head_dim, q.element_size()),
        BLOCK_D=block_d,
        BLOCK_N=64 if half else 32,
        HAS_LSE=lse is not None,
        ALIGNED=kv.data_ptr() % 16 == 0,
        HAS_WINDOW=window > 0,
        HAS_CAP=cap is not None,
        num_warps=8 if half else 4,
        num_stages=3 if half else 2,
    )


def attention_torch(
    q: torch.Tensor,
    kv: torch.Tensor,
    page_table: torch.Tensor,
    slots: list[int],
    starts: list[int],
    counts: list[int],
    *,
    scale: float,
    window: int = 0,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of both kernels in float32 (float64 if q is): rows lie one after another in
    q [T, Q, D]. Returns out [T, Q, D] in q's dtype and lse [T, Q]."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_q_heads, head_dim = q.shape[1], q.shape[2]
    page_tokens, num_kv_heads = kv.shape[2], kv.shape[3]
    group = num_q_heads // num_kv_heads
    outs, lses = [], []
    token = 0
    for slot, start, count in zip(slots, starts, counts, strict=True):
        length = start + count
        oldest = max(0, start - window + 1) if window else 0
        first_page = oldest // page_tokens
        pages = page_table[slot, first_page : -(-length // page_tokens)].long()
        pair = kv[pages].to(wide).transpose(0, 1).reshape(2, -1, num_kv_heads, head_dim)
        pair = pair[:, oldest - first_page * page_tokens : length - first_page * page_tokens]
        k, v = pair.repeat_interleave(group, dim=2)
        x = q[token : token + count].to(wide)
        s = torch.einsum("tqd,nqd->qtn", x, k) * scale
        position = torch.arange(start, length, device=q.device)
        ahead = torch.arange(oldest, length, device=q.device)[None, :] - position[:, None]
        hidden = (ahead > 0) | (ahead <= -window) if window else ahead > 0
        s = (s if cap is None else torch.tanh(s / cap) * cap).masked_fill(hidden, float("-inf"))
        lses.append(torch.logsumexp(s, dim=-1).T)
        outs.append(torch.einsum("qtn,nqd->tqd", torch.softmax(s, dim=-1), v).to(q.dtype))
        token += count
    return torch.cat(outs), torch.cat(lses)

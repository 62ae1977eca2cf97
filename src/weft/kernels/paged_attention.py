"""Attention over paged KV: one Triton kernel for rows of one token, one for chunks, one to merge.

Shapes: T tokens of the step, R rows, Q query heads, K KV heads, G = Q / K, D head dim,
P pages, N page tokens, S splits. A layer's KV is a strided view [P, 2, N, K, D] of the pool
`[page][layer][K,V][token][kv head][head dim]`.

A row's result is a function of its own queries, keys and values and of the launch shape (the
number of splits and the block sizes): no atomics, no dependence on page ids or on other rows.
Sums run over key blocks in ascending order; splits are merged in ascending order.

Kernels and their launchers are longer than functions elsewhere: a kernel cannot hand its registers
to a helper that the compiler would not inline, and most of a launcher is its list of arguments.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = math.log2(math.e)
MAX_SPLITS = 64


@triton.jit
def _key_tile(
    kv_ptr,
    table_ptr,
    n_start,
    limit,
    offs_d,
    page_stride,
    token_stride,
    value_offset,
    PAGE_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys [D, N] and values [N, D] of positions n_start .. ; zeros at and past `limit`."""
    offs_n = n_start + tl.arange(0, BLOCK_N)
    in_n = offs_n < limit
    page = tl.load(table_ptr + offs_n // PAGE_TOKENS, mask=in_n, other=0).to(tl.int64)
    at = page * page_stride + (offs_n % PAGE_TOKENS) * token_stride
    if HEAD_DIM == BLOCK_D:
        k = tl.load(kv_ptr + at[None, :] + offs_d[:, None], mask=in_n[None, :], other=0.0)
        v = tl.load(
            kv_ptr + value_offset + at[:, None] + offs_d[None, :], mask=in_n[:, None], other=0.0
        )
    else:
        in_d = offs_d < HEAD_DIM
        k = tl.load(
            kv_ptr + at[None, :] + offs_d[:, None],
            mask=in_n[None, :] & in_d[:, None],
            other=0.0,
        )
        v = tl.load(
            kv_ptr + value_offset + at[:, None] + offs_d[None, :],
            mask=in_n[:, None] & in_d[None, :],
            other=0.0,
        )
    return k, v, offs_n


# The KV range comes as an address, not as a tensor: its first granule may be unmapped while later
# ones are in use, and a launcher that looks at the pointer would refuse it.
# What changes from step to step must not lead to new compilations.
@triton.jit(
    do_not_specialize=["splits", "out_row_stride", "lse_row_stride"],
    do_not_specialize_on_alignment=["slot_ptr", "start_ptr", "query_ptr"],
)
def _decode_kernel(
    q_ptr,
    kv_address,
    table_ptr,
    slot_ptr,
    start_ptr,
    query_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    q_token_stride,
    q_head_stride,
    page_stride,
    token_stride,
    value_offset,
    table_stride,
    out_row_stride,
    out_split_stride,
    out_head_stride,
    lse_row_stride,
    lse_split_stride,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Grid (R, K, S). One row, one KV head, one split of its keys.

    BY_TOKEN: `out` is indexed by the row's token (the final tensor); otherwise by the row (the
    partial results, merged afterwards).
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    length = tl.load(start_ptr + row) + 1
    token = tl.load(query_ptr + row).to(tl.int64)
    table = table_ptr + slot * table_stride
    kv = kv_address.to(q_ptr.dtype) + head * HEAD_DIM

    span = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    low = split * span
    high = tl.minimum(low + span, length)

    offs_g = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    in_q = (offs_g < GROUP)[:, None] & (offs_d < HEAD_DIM)[None, :]
    q_at = token * q_token_stride + (head * GROUP + offs_g) * q_head_stride
    q = tl.load(q_ptr + q_at[:, None] + offs_d[None, :], mask=in_q, other=0.0)

    m = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_G], dtype=tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    for n_start in range(low, high, BLOCK_N):
        k, v, offs_n = _key_tile(
            kv,
            table,
            n_start,
            high,
            offs_d,
            page_stride,
            token_stride,
            value_offset,
            PAGE_TOKENS,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
        )
        s = tl.dot(q, k, input_precision="ieee") * scale_log2
        s = tl.where((offs_n < high)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shrink = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new

    # A split past the row's keys is empty: zeros with weight 2 ** -inf.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = acc / total[:, None]
    if BY_TOKEN:
        out_at = token * out_row_stride
        lse_at = token * lse_row_stride
    else:
        out_at = row.to(tl.int64) * out_row_stride + split * out_split_stride
        lse_at = row.to(tl.int64) * lse_row_stride + split * lse_split_stride
    offs_q = head * GROUP + offs_g
    tl.store(
        out_ptr + out_at + offs_q[:, None] * out_head_stride + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=in_q,
    )
    if HAS_LSE:
        # Partial results keep base 2; what callers see is natural.
        lse = tl.where(empty, float("-inf"), m + tl.log2(total))
        if BY_TOKEN:
            lse = lse * 0.6931471805599453
        tl.store(lse_ptr + lse_at + offs_q, lse, mask=offs_g < GROUP)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["query_ptr"])
def _merge_kernel(
    part_ptr,
    part_lse_ptr,
    query_ptr,
    out_ptr,
    lse_ptr,
    out_token_stride,
    out_head_stride,
    lse_token_stride,
    splits,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Grid (R, Q). part [R, S, Q, D] float32, part_lse [R, S, Q] float32 base 2."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_ptr + row).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    in_s = offs_s < splits
    at = (row.to(tl.int64) * splits + offs_s) * Q_HEADS + head
    lse = tl.load(part_lse_ptr + at, mask=in_s, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - top)
    total = tl.sum(weight, 0)
    part = tl.load(
        part_ptr + at[:, None] * HEAD_DIM + offs_d[None, :],
        mask=in_s[:, None] & (offs_d < HEAD_DIM)[None, :],
        other=0.0,
    )
    out = tl.sum(part * weight[:, None], 0) / total
    tl.store(
        out_ptr + token * out_token_stride + head * out_head_stride + offs_d,
        out.to(out_ptr.dtype.element_ty),
        mask=offs_d < HEAD_DIM,
    )
    if HAS_LSE:
        tl.store(
            lse_ptr + token * lse_token_stride + head,
            (top + tl.log2(total)) * 0.6931471805599453,
        )


@triton.jit
def _chunk_tile(
    q,
    k,
    v,
    offs_n,
    position,
    m,
    total,
    acc,
    scale_log2,
    MASKED: tl.constexpr,
):
    s = tl.dot(q, k, input_precision="ieee") * scale_log2
    if MASKED:
        s = tl.where(offs_n[None, :] <= position[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    shrink = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, total, acc


@triton.jit(
    do_not_specialize_on_alignment=[
        "block_slot_ptr",
        "block_position_ptr",
        "block_token_ptr",
        "block_count_ptr",
    ]
)
def _chunk_kernel(
    q_ptr,
    kv_address,
    table_ptr,
    block_slot_ptr,
    block_position_ptr,
    block_token_ptr,
    block_count_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    q_token_stride,
    q_head_stride,
    page_stride,
    token_stride,
    value_offset,
    table_stride,
    out_token_stride,
    out_head_stride,
    lse_token_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Grid (blocks, K). A block is up to BLOCK_M // G consecutive tokens of one row; query m of
    the tile is head m % G of the group at token m // G."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(block_slot_ptr + block).to(tl.int64)
    first = tl.load(block_position_ptr + block)
    token0 = tl.load(block_token_ptr + block).to(tl.int64)
    count = tl.load(block_count_ptr + block)
    table = table_ptr + slot * table_stride
    kv = kv_address.to(q_ptr.dtype) + head * HEAD_DIM

    offs_m = tl.arange(0, BLOCK_M)
    offs_t = offs_m // GROUP
    offs_q = head * GROUP + offs_m % GROUP
    offs_d = tl.arange(0, BLOCK_D)
    in_m = offs_t < count
    in_q = in_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    # Lanes past the block repeat its first position, so that no row of the tile is all masked.
    position = first + tl.where(in_m, offs_t, 0)
    q_at = (token0 + offs_t) * q_token_stride + offs_q * q_head_stride
    q = tl.load(q_ptr + q_at[:, None] + offs_d[None, :], mask=in_q, other=0.0)

    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    limit = first + count
    seen_by_all = (first + 1) // BLOCK_N * BLOCK_N
    for n_start in range(0, seen_by_all, BLOCK_N):
        k, v, offs_n = _key_tile(
            kv,
            table,
            n_start,
            limit,
            offs_d,
            page_stride,
            token_stride,
            value_offset,
            PAGE_TOKENS,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
        )
        m, total, acc = _chunk_tile(q, k, v, offs_n, position, m, total, acc, scale_log2, False)
    for n_start in range(seen_by_all, limit, BLOCK_N):
        k, v, offs_n = _key_tile(
            kv,
            table,
            n_start,
            limit,
            offs_d,
            page_stride,
            token_stride,
            value_offset,
            PAGE_TOKENS,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
        )
        m, total, acc = _chunk_tile(q, k, v, offs_n, position, m, total, acc, scale_log2, True)

    out = acc / total[:, None]
    out_at = (token0 + offs_t) * out_token_stride + offs_q * out_head_stride
    tl.store(
        out_ptr + out_at[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=in_q
    )
    if HAS_LSE:
        lse = (m + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + (token0 + offs_t) * lse_token_stride + offs_q, lse, mask=in_m)


def decode_splits(rows: int, num_kv_heads: int, longest: int, *, num_sms: int = 132) -> int:
    """How many pieces each row's keys are cut into: 1 where the rows alone fill the device, up to
    MAX_SPLITS where one long row must. A function of the plan's shape only."""
    want = -(-2 * num_sms // (rows * num_kv_heads))
    return max(1, min(want, -(-longest // 256), MAX_SPLITS))


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
    splits: int = 1,
    partial: torch.Tensor | None = None,
    partial_lse: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Rows of one token: row r is token query[r] of q [T, Q, D], at position start[r], with keys
    0 .. start[r] in the pages of page_table[slot[r]]. Writes out[query[r]] [T, Q, D].

    kv [P, 2, N, K, D] strided; page_table int32 [slots, max_pages]; slot, start, query int32 [R].
    With splits > 1, `partial` float32 [>= R*S*Q*D] and `partial_lse` [>= R*S*Q] are scratch.
    lse: optional float32 [T, Q], natural logarithm.
    """
    rows = slot.shape[0]
    num_q_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads, page_tokens = kv.shape[3], kv.shape[2]
    group = num_q_heads // num_kv_heads
    block_d = _block_d(head_dim)
    block_n = 64 if q.element_size() == 2 and block_d <= 128 else 32
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
    _decode_kernel[(rows, num_kv_heads, splits)](
        q,
        kv.data_ptr(),
        page_table,
        slot,
        start,
        query,
        target,
        target_lse if target_lse is not None else target,
        scale * LOG2E,
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
        BLOCK_N=block_n,
        BY_TOKEN=whole,
        HAS_LSE=target_lse is not None,
        num_warps=4,
        num_stages=3,
    )
    if whole:
        return
    _merge_kernel[(rows, num_q_heads)](
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
        BLOCK_S=MAX_SPLITS,
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
    lse: torch.Tensor | None = None,
) -> None:
    """Rows of several tokens, causal: block b is tokens token[b] .. token[b] + count[b] - 1 of
    q [T, Q, D], at positions position[b] .., of the row in slot[b], whose keys up to its own
    position are in the pool already. Writes out [T, Q, D] there; lse as in decode_attention."""
    num_q_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads, page_tokens = kv.shape[3], kv.shape[2]
    group = num_q_heads // num_kv_heads
    block_d = _block_d(head_dim)
    half = q.element_size() == 2 and block_d <= 128
    _chunk_kernel[(blocks.slot.shape[0], num_kv_heads)](
        q,
        kv.data_ptr(),
        page_table,
        blocks.slot,
        blocks.position,
        blocks.token,
        blocks.count,
        out,
        lse if lse is not None else out,
        scale * LOG2E,
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
        pages = page_table[slot, : -(-length // page_tokens)].long()
        pair = kv[pages].to(wide).transpose(0, 1).reshape(2, -1, num_kv_heads, head_dim)
        k, v = pair[:, :length].repeat_interleave(group, dim=2)
        x = q[token : token + count].to(wide)
        s = torch.einsum("tqd,nqd->qtn", x, k) * scale
        position = torch.arange(start, length, device=q.device)
        ahead = torch.arange(length, device=q.device)[None, :] > position[:, None]
        s = s.masked_fill(ahead, float("-inf"))
        lses.append(torch.logsumexp(s, dim=-1).T)
        outs.append(torch.einsum("qtn,nqd->tqd", torch.softmax(s, dim=-1), v).to(q.dtype))
        token += count
    return torch.cat(outs), torch.cat(lses)

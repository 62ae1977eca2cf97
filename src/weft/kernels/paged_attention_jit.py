"""The kernels of `paged_attention`: rows of one token, chunks, and the merge of split rows.

Shapes: T tokens of the step, R rows, Q query heads, K KV heads, G = Q / K, D head dim,
P pages, N page tokens, S splits. A layer's KV is a strided view [P, 2, N, K, D] of the pool
`[page][layer][K,V][token][kv head][head dim]`.

A row's result is a function of its own queries, keys and values and of the launch shape (the
number of splits and the block sizes): no atomics, no dependence on page ids or on other rows.
Sums run over key blocks in ascending order; splits are merged in ascending order.

Kernels are longer than functions elsewhere: a kernel cannot hand its registers to a helper that the
compiler would not inline.
"""

import triton
import triton.language as tl


@triton.jit
def _kv_pointer(kv_address, like_ptr, ALIGNED: tl.constexpr):
    """The address as a pointer. The cast forgets how it is aligned, and with that the compiler
    would load two bytes at a time: decoding was five times slower."""
    kv = kv_address.to(like_ptr.dtype)
    if ALIGNED:
        kv = tl.multiple_of(kv, 16)
    return kv


@triton.jit
def _capped(s, scale, cap, HAS_CAP: tl.constexpr):
    """Scores in base 2: log2(e) * s * scale, soft-capped in between where a class does so."""
    if HAS_CAP:
        # cap * tanh(x) = cap * (1 - 2 / (exp(2 x) + 1)); an infinite exp gives 1.
        x = s * (scale * 2.0 * 1.4426950408889634 / cap)
        return cap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp2(x) + 1.0))
    return s * (scale * 1.4426950408889634)


@triton.jit
def _key_tile(
    kv_ptr,
    table_ptr,
    n_start,
    first,
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
    """Keys [D, N] and values [N, D] of positions n_start .. ; zeros before `first` and at and past
    `limit`: pages without a position in between are not touched."""
    offs_n = n_start + tl.arange(0, BLOCK_N)
    in_n = (offs_n >= first) & (offs_n < limit)
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
    do_not_specialize=["splits", "window", "out_row_stride", "lse_row_stride"],
    do_not_specialize_on_alignment=["slot_ptr", "start_ptr", "query_ptr"],
)
def decode_kernel(
    q_ptr,
    kv_address,
    table_ptr,
    slot_ptr,
    start_ptr,
    query_ptr,
    out_ptr,
    lse_ptr,
    scale,
    cap,
    window,
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
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Grid (R, K, S). One row, one KV head, one split of its keys: of the last `window` of them.

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
    kv = _kv_pointer(kv_address, q_ptr, ALIGNED) + head * HEAD_DIM

    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    # Blocks are those of the whole row: which keys are summed together does not depend on `first`.
    start = first // BLOCK_N
    span = tl.cdiv(tl.cdiv(length, BLOCK_N) - start, splits) * BLOCK_N
    low = start * BLOCK_N + split * span
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
            first,
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
        s = _capped(tl.dot(q, k, input_precision="ieee"), scale, cap, HAS_CAP)
        s = tl.where(((offs_n >= first) & (offs_n < high))[None, :], s, float("-inf"))
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
def merge_kernel(
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
    # A row that only fills the batch has no keys at all: it becomes zeros.
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - top)
    total = tl.sum(weight, 0)
    total = tl.where(total == 0.0, 1.0, total)
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
    scale,
    cap,
    window,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    s = _capped(tl.dot(q, k, input_precision="ieee"), scale, cap, HAS_CAP)
    if MASKED:
        s = tl.where(offs_n[None, :] <= position[:, None], s, float("-inf"))
    if HAS_WINDOW:
        s = tl.where(offs_n[None, :] > position[:, None] - window, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    top = m_new
    if HAS_WINDOW:
        # A query may see nothing of a block that others of the tile need.
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
    shrink = tl.exp2(m - top)
    p = tl.exp2(s - top[:, None])
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, total, acc


@triton.jit(
    do_not_specialize=["window"],
    do_not_specialize_on_alignment=[
        "block_slot_ptr",
        "block_position_ptr",
        "block_token_ptr",
        "block_count_ptr",
    ],
)
def chunk_kernel(
    q_ptr,
    kv_address,
    table_ptr,
    block_slot_ptr,
    block_position_ptr,
    block_token_ptr,
    block_count_ptr,
    out_ptr,
    lse_ptr,
    scale,
    cap,
    window,
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
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ALIGNED: tl.constexpr,
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
    kv = _kv_pointer(kv_address, q_ptr, ALIGNED) + head * HEAD_DIM

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
    oldest = 0
    if HAS_WINDOW:
        oldest = tl.maximum(first - window + 1, 0)
    begin = oldest // BLOCK_N * BLOCK_N
    seen_by_all = (first + 1) // BLOCK_N * BLOCK_N
    for n_start in range(begin, seen_by_all, BLOCK_N):
        k, v, offs_n = _key_tile(
            kv,
            table,
            n_start,
            oldest,
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
        m, total, acc = _chunk_tile(
            q,
            k,
            v,
            offs_n,
            position,
            m,
            total,
            acc,
            scale,
            cap,
            window,
            False,
            HAS_WINDOW,
            HAS_CAP,
        )
    for n_start in range(tl.maximum(begin, seen_by_all), limit, BLOCK_N):
        k, v, offs_n = _key_tile(
            kv,
            table,
            n_start,
            oldest,
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
        m, total, acc = _chunk_tile(
            q,
            k,
            v,
            offs_n,
            position,
            m,
            total,
            acc,
            scale,
            cap,
            window,
            True,
            HAS_WINDOW,
            HAS_CAP,
        )

    out = acc / total[:, None]
    out_at = (token0 + offs_t) * out_token_stride + offs_q * out_head_stride
    tl.store(
        out_ptr + out_at[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=in_q
    )
    if HAS_LSE:
        lse = (m + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + (token0 + offs_t) * lse_token_stride + offs_q, lse, mask=in_m)

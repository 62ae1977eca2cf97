"""From the fused QKV product to what attention needs, in one kernel: QK norm, rotary embedding, K
and V into their pages, queries side by side.

The torch twin is what `models.decoder.Decoder` does without it: `Ops.rms_norm` per head,
`Ops.rotary`, `attention.base.store_kv`.

Shape legend: T tokens, Q query heads, G KV heads, D head dim, E rotary dim / 2, P pages, N page
tokens.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _heads_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    kv_address,
    position_ptr,
    row_ptr,
    slot_ptr,
    table_ptr,
    eps,
    x_token_stride,
    x_group_stride,
    x_head_stride,
    cos_stride,
    page_stride,
    token_stride,
    value_offset,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Grid (T, G). Heads of KV head g: GROUP queries, its key, its value."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    position = tl.load(position_ptr + token)
    # Rows that only fill up a batch have no position: they have nothing to store.
    real = position >= 0
    place = tl.maximum(position, 0)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    head = tl.arange(0, BLOCK_N)[:, None]
    at = tl.arange(0, BLOCK_E)[None, :]
    is_head = head <= GROUP
    inside = is_head & (at < HALF)
    x = x_ptr + token * x_token_stride + group * x_group_stride
    heads = x + head * x_head_stride
    low = tl.load(heads + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(heads + at + HALF, mask=inside, other=0.0).to(tl.float32)
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    in_rest = is_head & (rest < HEAD_DIM)
    kept = low
    if 2 * HALF < HEAD_DIM:
        kept = tl.load(heads + rest, mask=in_rest, other=0.0).to(tl.float32)
    if HAS_NORM:
        square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        if 2 * HALF < HEAD_DIM:
            square += tl.sum(kept * kept, 1)
        scale = tl.rsqrt(square / HEAD_DIM + eps)[:, None]
        low = _normed(low, scale, q_norm_ptr, k_norm_ptr, at, head, inside, OFFSET, GROUP)
        high = _normed(high, scale, q_norm_ptr, k_norm_ptr, at + HALF, head, inside, OFFSET, GROUP)
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
        if 2 * HALF < HEAD_DIM:
            kept = _normed(kept, scale, q_norm_ptr, k_norm_ptr, rest, head, in_rest, OFFSET, GROUP)
    in_table = at < HALF
    cos = tl.load(cos_ptr + place * cos_stride + at, mask=in_table, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + place * cos_stride + at, mask=in_table, other=0.0).to(tl.float32)
    new_low = (low * cos - high * sin).to(dtype)
    new_high = (high * cos + low * sin).to(dtype)

    q_heads = q_ptr + (token * KV_HEADS * GROUP + group * GROUP + head) * HEAD_DIM
    is_q = inside & (head < GROUP)
    tl.store(q_heads + at, new_low, mask=is_q)
    tl.store(q_heads + at + HALF, new_high, mask=is_q)

    slot = tl.load(slot_ptr + tl.load(row_ptr + token)).to(tl.int64)
    page = tl.load(table_ptr + slot * table_stride + place // PAGE_TOKENS, mask=real, other=0)
    kv = kv_address.to(q_ptr.dtype)
    if ALIGNED:  # the cast forgets it
        kv = tl.multiple_of(kv, 16)
    to = kv + page.to(tl.int64) * page_stride + (place % PAGE_TOKENS) * token_stride
    to += group * HEAD_DIM
    k_head = to + head * 0
    is_k = inside & (head == GROUP) & real
    tl.store(k_head + at, new_low, mask=is_k)
    tl.store(k_head + at + HALF, new_high, mask=is_k)
    if 2 * HALF < HEAD_DIM:
        tl.store(q_heads + rest, kept.to(dtype), mask=in_rest & (head < GROUP))
        tl.store(k_head + rest, kept.to(dtype), mask=in_rest & (head == GROUP) & real)
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < HEAD_DIM
    v = tl.load(x + (GROUP + 1) * x_head_stride + offs_d, mask=in_d, other=0.0)
    tl.store(to + value_offset + offs_d, v, mask=in_d & real)


@triton.jit
def _normed(
    x, scale, q_norm_ptr, k_norm_ptr, at, head, inside, OFFSET: tl.constexpr, GROUP: tl.constexpr
):
    """As `elementwise._norm_kernel`: rounded before the weight, or with OFFSET once after it."""
    dtype: tl.constexpr = q_norm_ptr.dtype.element_ty
    q_weight = tl.load(q_norm_ptr + at + head * 0, mask=inside & (head < GROUP), other=0.0)
    k_weight = tl.load(k_norm_ptr + at + head * 0, mask=inside & (head == GROUP), other=0.0)
    weight = tl.where(head < GROUP, q_weight, k_weight).to(tl.float32)
    if OFFSET == 0.0:
        out = (x * scale).to(dtype).to(tl.float32) * weight
    else:
        out = x * scale * (weight + OFFSET)
    return out


def split_heads(
    heads_TGXD: torch.Tensor,
    cos_PE: torch.Tensor,
    sin_PE: torch.Tensor,
    kv: torch.Tensor,
    positions: torch.Tensor,
    token_rows: torch.Tensor,
    slots: torch.Tensor,
    page_table: torch.Tensor,
    *,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
) -> torch.Tensor:
    """The rotated queries [T, Q, D]; K and V of every token are in its page afterwards.

    heads [T, G, Q / G + 2, D], unit stride in D; cos and sin tables by position; kv one layer's
    view [P, 2, N, G, D] of the pool; norms: weights [D] of the query and of the key heads. Tokens
    at negative positions store nothing.
    """
    tokens, kv_heads, parts, head_dim = heads_TGXD.shape
    group, half = parts - 2, cos_PE.shape[1]
    shape = (tokens, kv_heads * group, head_dim)
    q_TQD = torch.empty(shape, dtype=heads_TGXD.dtype, device=heads_TGXD.device)
    q_norm, k_norm = norms if norms is not None else (q_TQD, q_TQD)
    _heads_kernel[(tokens, kv_heads)](
        heads_TGXD,
        cos_PE,
        sin_PE,
        q_norm,
        k_norm,
        q_TQD,
        kv.data_ptr(),
        positions,
        token_rows,
        slots,
        page_table,
        eps,
        heads_TGXD.stride(0),
        heads_TGXD.stride(1),
        heads_TGXD.stride(2),
        cos_PE.stride(0),
        kv.stride(0),
        kv.stride(2),
        kv.stride(1),
        page_table.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        HALF=half,
        PAGE_TOKENS=kv.shape[2],
        BLOCK_N=triton.next_power_of_2(group + 1),
        BLOCK_E=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)),
        BLOCK_D=triton.next_power_of_2(head_dim),
        HAS_NORM=norms is not None,
        OFFSET=norm_offset,
        ALIGNED=kv.data_ptr() % 16 == 0,
        num_warps=1 if (group + 1) * head_dim <= 1024 else 2,
    )
    return q_TQD

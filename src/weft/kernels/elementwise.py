"""What lies between the matrix products of a decoder layer, one kernel each.

All arithmetic is float32, rounded to the model's dtype where the torch twins
(`models.ops.TorchOps`, `attention.base.store_kv`) round last.

Shapes: T tokens, H hidden size, Q query heads, G KV heads, D head dim, E rotary dim / 2,
I intermediate size, B gate/up blocks, N page tokens.
"""

import torch
import triton
import triton.language as tl

from weft.core.model import Activation
from weft.kernels.skinny import Scratch, pays, skinny_mm


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    x_stride,
    residual_stride,
    out_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Grid (T,). out = norm(x [+ residual]) * (weight + OFFSET); with ADD the sum goes to
    residual. Without an offset the normed x is rounded before the product, as transformers does."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    x = tl.load(x_ptr + token * x_stride + at, mask=inside, other=0.0)
    if ADD:
        residual = residual_ptr + token * residual_stride + at
        # The sum is rounded before it is normed: what the next layer adds to is what was seen.
        x = (x.to(tl.float32) + tl.load(residual, mask=inside, other=0.0).to(tl.float32)).to(
            x.dtype
        )
        tl.store(residual, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    if OFFSET == 0.0:
        out = weight.to(tl.float32) * (wide * scale).to(x.dtype).to(tl.float32)
    else:
        out = (weight.to(tl.float32) + OFFSET) * (wide * scale)
    tl.store(out_ptr + token * out_stride + at, out.to(x.dtype), mask=inside)


@triton.jit
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    x_token_stride,
    x_group_stride,
    x_head_stride,
    table_stride,
    k_token_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Grid (T, G). Heads 0 .. GROUP of KV head g: GROUP queries, then its key. The first 2 * HALF
    dimensions are rotated, the rest is copied."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    head = tl.arange(0, BLOCK_N)[:, None]
    at = tl.arange(0, BLOCK_E)[None, :]
    inside = (head <= GROUP) & (at < HALF)
    x = x_ptr + token * x_token_stride + group * x_group_stride + head * x_head_stride + at
    low = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * table_stride + at, mask=at < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * table_stride + at, mask=at < HALF, other=0.0).to(tl.float32)
    new_low = (low * cos - high * sin).to(q_ptr.dtype.element_ty)
    new_high = (high * cos + low * sin).to(q_ptr.dtype.element_ty)
    q_heads = q_ptr + (token * KV_HEADS * GROUP + group * GROUP + head) * HEAD_DIM
    is_q = inside & (head < GROUP)
    tl.store(q_heads + at, new_low, mask=is_q)
    tl.store(q_heads + at + HALF, new_high, mask=is_q)
    k_head = k_ptr + token * k_token_stride + group * HEAD_DIM + head * 0
    is_k = inside & (head == GROUP)
    tl.store(k_head + at, new_low, mask=is_k)
    tl.store(k_head + at + HALF, new_high, mask=is_k)
    if 2 * HALF < HEAD_DIM:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        inside = (head <= GROUP) & (rest < HEAD_DIM)
        x = x_ptr + token * x_token_stride + group * x_group_stride + head * x_head_stride
        kept = tl.load(x + rest, mask=inside, other=0.0)
        tl.store(q_heads + rest, kept, mask=inside & (head < GROUP))
        tl.store(k_head + rest, kept, mask=inside & (head == GROUP))


@triton.jit
def _act_kernel(
    x_ptr,
    out_ptr,
    x_stride,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
):
    """Grid (T, ceil(I / BLOCK)). x [T, B, 2, PART]: per block gate, then up. silu, or with GELU
    the tanh form of gelu: both are gate * sigmoid of something."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    x = x_ptr + token * x_stride + (at // PART) * (2 * PART) + at % PART
    gate = tl.load(x, mask=inside, other=0.0)
    up = tl.load(x + PART, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    inner = wide
    if GELU:
        # (1 + tanh(z)) / 2 = sigmoid(2 z), z = sqrt(2 / pi) * (x + 0.044715 x^3)
        inner = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
        inner = tl.maximum(inner, -80.0)  # the cube would overflow exp; 0 to float32 long before
    active = (wide / (1.0 + tl.exp(-inner))).to(gate.dtype)
    out = active.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + token * SIZE + at, out.to(gate.dtype), mask=inside)


@triton.jit
def _store_kernel(
    k_ptr,
    v_ptr,
    kv_address,
    position_ptr,
    row_ptr,
    slot_ptr,
    table_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    page_stride,
    token_stride,
    value_offset,
    table_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Grid (T,). K and V of one token to its place in its page."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + token)
    slot = tl.load(slot_ptr + tl.load(row_ptr + token)).to(tl.int64)
    page = tl.load(table_ptr + slot * table_stride + position // PAGE_TOKENS).to(tl.int64)
    kv = kv_address.to(k_ptr.dtype)
    if ALIGNED:  # the cast forgets it, and would store two bytes at a time
        kv = tl.multiple_of(kv, 16)
    to = kv + page * page_stride + (position % PAGE_TOKENS) * token_stride
    at = tl.arange(0, BLOCK)
    inside = at < HEADS * HEAD_DIM
    head = at // HEAD_DIM
    k = k_ptr + token * k_token_stride + head * k_head_stride + at % HEAD_DIM
    v = v_ptr + token * v_token_stride + head * v_head_stride + at % HEAD_DIM
    tl.store(to + at, tl.load(k, mask=inside, other=0.0), mask=inside)
    tl.store(to + value_offset + at, tl.load(v, mask=inside, other=0.0), mask=inside)


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


def _norm(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor | None,
    weight_H: torch.Tensor,
    eps: float,
    offset: float,
) -> torch.Tensor:
    tokens, size = x_TH.shape
    out_TH = torch.empty((tokens, size), dtype=x_TH.dtype, device=x_TH.device)
    if tokens == 0:
        return out_TH
    other = x_TH if residual_TH is None else residual_TH
    block = triton.next_power_of_2(size)
    _norm_kernel[(tokens,)](
        x_TH,
        other,
        weight_H,
        out_TH,
        eps,
        x_TH.stride(0),
        other.stride(0),
        size,
        SIZE=size,
        BLOCK=block,
        ADD=residual_TH is not None,
        OFFSET=offset,
        num_warps=_warps(block),
    )
    return out_TH


class TritonOps:
    """`models.ops.Ops` by the kernels above; for tensors with a unit stride in the last axis."""

    def rms_norm(
        self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0
    ) -> torch.Tensor:
        return _norm(x_TH, None, weight_H, eps, offset)

    def add_rms_norm(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the sum into residual_TH."""
        return _norm(x_TH, residual_TH, weight_H, eps, offset), residual_TH

    def rotary(
        self, x_TND: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor
    ) -> torch.Tensor:
        """A new contiguous tensor [T, N, D]."""
        return split_rotary(x_TND[:, :, None], cos_TE, sin_TE, group=0)[1]

    def __init__(self) -> None:
        self._scratch: dict[int, Scratch] = {}

    def product(
        self,
        x_TI: torch.Tensor,
        weight_IO: torch.Tensor,
        bias_O: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """By our own kernel where that is faster than cuBLAS."""
        if x_TI.element_size() != 2 or not pays(x_TI.shape[0], *weight_IO.shape):
            if bias_O is None:
                return torch.mm(x_TI, weight_IO, out=out)
            return torch.addmm(bias_O, x_TI, weight_IO, out=out)
        stream = torch.cuda.current_stream().cuda_stream if x_TI.is_cuda else 0
        scratch = self._scratch.get(stream)
        if scratch is None:
            scratch = self._scratch[stream] = Scratch.make(x_TI.device)
        return skinny_mm(x_TI, weight_IO, bias_O, scratch, out)

    def act_mul(self, gate_up_TB2I: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
        tokens, blocks, _, part = gate_up_TB2I.shape
        size = blocks * part
        out_TI = torch.empty((tokens, size), dtype=gate_up_TB2I.dtype, device=gate_up_TB2I.device)
        if tokens:
            _act_kernel[(tokens, triton.cdiv(size, 2048))](
                gate_up_TB2I,
                out_TI,
                gate_up_TB2I.stride(0),
                SIZE=size,
                PART=part,
                BLOCK=2048,
                GELU=activation == "gelu_tanh",
                num_warps=4,
            )
        return out_TI


def split_rotary(
    heads_TGND: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor, *, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """heads [T, G, group + 1 or more, D]: per KV head its queries, its key, the rest untouched.

    cos and sin [T, E]: the first 2 E dimensions are rotated. Returns the rotated q
    [T, G * group, D] and k [T, G, D], new and contiguous.
    """
    tokens, kv_heads, _, head_dim = heads_TGND.shape
    half = cos_TE.shape[1]
    kwargs = {"dtype": heads_TGND.dtype, "device": heads_TGND.device}
    q_TQD = torch.empty((tokens, kv_heads * group, head_dim), **kwargs)
    k_TGD = torch.empty((tokens, kv_heads, head_dim), **kwargs)
    if tokens:
        _rotary_kernel[(tokens, kv_heads)](
            heads_TGND,
            cos_TE,
            sin_TE,
            q_TQD if group else k_TGD,
            k_TGD,
            heads_TGND.stride(0),
            heads_TGND.stride(1),
            heads_TGND.stride(2),
            cos_TE.stride(0),
            k_TGD.stride(0),
            KV_HEADS=kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            HALF=half,
            BLOCK_N=triton.next_power_of_2(group + 1),
            BLOCK_E=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)),
            num_warps=2,
        )
    return q_TQD, k_TGD


def store_kv(
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    kv: torch.Tensor,
    positions: torch.Tensor,
    token_rows: torch.Tensor,
    slots: torch.Tensor,
    page_table: torch.Tensor,
) -> None:
    """Write K and V of T tokens into one layer's view kv [P, 2, N, G, D] of the pool, at
    positions [T] of the slots[token_rows[t]]'s pages. k, v: unit stride in D."""
    tokens, heads, head_dim = k_TGD.shape
    if tokens == 0:
        return
    block = triton.next_power_of_2(heads * head_dim)
    _store_kernel[(tokens,)](
        k_TGD,
        v_TGD,
        kv.data_ptr(),
        positions,
        token_rows,
        slots,
        page_table,
        k_TGD.stride(0),
        k_TGD.stride(1),
        v_TGD.stride(0),
        v_TGD.stride(1),
        kv.stride(0),
        kv.stride(2),
        kv.stride(1),
        page_table.stride(0),
        HEADS=heads,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=kv.shape[2],
        BLOCK=block,
        ALIGNED=kv.data_ptr() % 16 == 0,
        num_warps=_warps(block),
    )

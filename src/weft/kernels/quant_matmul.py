"""Products with FP8 and 4-bit matrices (W8A16, W4A16), dequantized on the fly.

For few tokens one fused kernel reads the quantized bytes once: a tile of weights is the left
operand, [outputs, inputs] from registers, and the tokens are the narrow right one, so that a step
of one token wastes little of the tensor cores' 64 rows. Inputs are cut into splits where outputs
alone would leave processors idle; partial sums are added in ascending order by a second kernel, so
the same launch gives the same bits. Codes less their zero points are exact in every dtype; sums are
float32 and scaled per group: weights are never rounded (the torch twin rounds each to x's dtype).

For many tokens the matrix is dequantized into a scratch of bounded size, part by part, and
multiplied by the vendor's library: the arithmetic is then worth more than the bytes.

Shapes: T tokens, O outputs, I inputs, N blocks of R = O / N outputs, S inputs that share a scale,
P inputs of a run of packed bytes (`models.quant_layout`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from weft.kernels.quant_weight import QuantWeight, dequantize

MAX_SPLITS = 16
PREFILL_TOKENS = 160
"""From so many tokens on, dequantizing first is faster (benchmarks/quant)."""
SMALL_PREFILL_TOKENS = 65
"""The same on devices whose processors have too little shared memory for the largest tile."""
LARGEST_TILE_BYTES = 160 << 10
"""Shared memory of the largest tile, about."""
SCRATCH_BYTES = 64 << 20


@triton.jit
def _outputs(
    first,
    rows,
    outputs,
    w_block,
    w_row,
    groups,
    BLOCK_O: tl.constexpr,
    TILED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Of a tile's outputs: their numbers, and where their weights and scales begin. Outputs past
    the last read some other's weights.

    TILED: tiles divide a block. ALIGNED: 16 neighbours are in one block; said so that the compiler
    reads them together.
    """
    at = first + tl.arange(0, BLOCK_O)
    if TILED:
        block = first // rows
        row = first % rows + tl.arange(0, BLOCK_O)
        row = tl.max_contiguous(tl.multiple_of(row, BLOCK_O), BLOCK_O)
    elif ALIGNED:
        inside = tl.max_contiguous(tl.multiple_of(at % outputs, 16), 16)
        block = tl.max_constancy(inside // rows, 16)
        row = tl.max_contiguous(tl.multiple_of(inside % rows, 16), 16)
    else:
        inside = tl.minimum(at, outputs - 1)
        block, row = inside // rows, inside % rows
    w_at = block.to(tl.int64) * w_block + row.to(tl.int64) * w_row
    return at, w_at, block * groups * rows + row


@triton.jit
def _minus_zero(codes, zero, dtype: tl.constexpr):
    """codes - zero as numbers of a dtype, exactly. A code put into the low bits of a power of two
    whose last place is 1 is that power plus the code: no conversion, which would cost more than
    the product."""
    if dtype == tl.bfloat16:
        wide = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        out = wide - (zero.to(tl.float32) + 128.0).to(tl.bfloat16)
    elif dtype == tl.float16:
        wide = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        out = wide - (zero.to(tl.float32) + 1024.0).to(tl.float16)
    else:
        out = codes.to(tl.float32) - zero.to(tl.float32)
    return out


@triton.jit(do_not_specialize=["tokens"])
def _matmul_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    outputs,
    x_stride,
    w_block,
    w_row,
    w_input,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    TILED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Grid (O / BLOCK_O, T / BLOCK_T, SPLITS). out [T, O], or partial sums [SPLITS, T, O] float32.

    4 bits: BLOCK_I is a run, its two halves are two products.
    """
    groups: tl.constexpr = INPUTS // GROUP
    half: tl.constexpr = BLOCK_I // 2
    offs_o, w_at, scale_at = _outputs(
        tl.program_id(0) * BLOCK_O,
        rows,
        outputs,
        w_block,
        w_row,
        groups,
        BLOCK_O,
        TILED,
        ALIGNED,
    )
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    in_t = offs_t < tokens
    x_at = tl.minimum(offs_t, tokens - 1).to(tl.int64) * x_stride
    steps: tl.constexpr = (INPUTS + BLOCK_I - 1) // BLOCK_I
    span: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    acc = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32)
    # Scales and zero points are read a step ahead: too narrow to be read as the weights are.
    group = tl.minimum(split * span, steps - 1) * BLOCK_I // GROUP
    scale = tl.load(scale_ptr + scale_at + group * rows)
    zero = scale if FP8 else tl.load(zero_ptr + scale_at + group * rows)
    for step in range(split * span, tl.minimum(split * span + span, steps)):
        next_scale, next_zero = scale, zero
        if groups > 1:
            group = tl.minimum(step + 1, steps - 1) * BLOCK_I // GROUP
            next_scale = tl.load(scale_ptr + scale_at + group * rows)
            if not FP8:
                next_zero = tl.load(zero_ptr + scale_at + group * rows)
        if FP8:
            offs_i = step * BLOCK_I + tl.arange(0, BLOCK_I)
            if INPUTS % BLOCK_I == 0:
                raw = tl.load(w_ptr + w_at[:, None] + offs_i[None, :] * w_input)
                x = tl.load(x_ptr + x_at[None, :] + offs_i[:, None])
            else:
                in_i = offs_i < INPUTS
                raw = tl.load(
                    w_ptr + w_at[:, None] + offs_i[None, :] * w_input, mask=in_i[None, :], other=0
                )
                x = tl.load(x_ptr + x_at[None, :] + offs_i[:, None], mask=in_i[:, None], other=0.0)
            part = tl.dot(
                raw.to(tl.float8e4nv, bitcast=True).to(x.dtype), x, input_precision="ieee"
            )
        else:
            offs_h = tl.arange(0, half)
            raw = tl.load(w_ptr + w_at[:, None] + (step * half + offs_h)[None, :] * w_input)
            low_x = tl.load(x_ptr + x_at[None, :] + (step * BLOCK_I + offs_h)[:, None])
            high_x = tl.load(x_ptr + x_at[None, :] + (step * BLOCK_I + half + offs_h)[:, None])
            low = _minus_zero(raw & 15, zero[:, None], low_x.dtype)
            high = _minus_zero(raw >> 4, zero[:, None], low_x.dtype)
            part = tl.dot(low, low_x, input_precision="ieee")
            part = tl.dot(high, high_x, acc=part, input_precision="ieee")
        if groups == 1:
            acc += part
        else:
            acc += part * scale.to(tl.float32)[:, None]
        scale, zero = next_scale, next_zero
    if groups == 1:
        acc = acc * scale.to(tl.float32)[:, None]
    inside = (offs_o < outputs)[:, None] & in_t[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_o, mask=offs_o < outputs, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    out_at = (split * tokens + offs_t).to(tl.int64)[None, :] * outputs + offs_o[:, None]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _sum_kernel(
    part_ptr,
    bias_ptr,
    out_ptr,
    size,
    outputs,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T * O / BLOCK,). The sum of partial sums [SPLITS, T * O], in ascending order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(part_ptr + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(part_ptr + at + split * size, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first"])
def _dequantize_kernel(
    w_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    first,
    count,
    rows,
    outputs,
    w_block,
    w_row,
    w_input,
    out_row,
    out_input,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    TILED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Grid (O' / BLOCK_O, I / BLOCK_I). Outputs first .. first + count - 1, as numbers."""
    groups: tl.constexpr = INPUTS // GROUP
    half: tl.constexpr = BLOCK_I // 2
    begin = tl.program_id(0) * BLOCK_O
    _, w_at, scale_at = _outputs(
        first + begin, rows, outputs, w_block, w_row, groups, BLOCK_O, TILED, ALIGNED
    )
    step = tl.program_id(1)
    group = step * BLOCK_I // GROUP
    # Counted from the part's beginning, whose alignment the compiler need not know.
    local = begin + tl.arange(0, BLOCK_O)
    in_o = (local < count)[:, None]
    scale = tl.load(scale_ptr + scale_at + group * rows).to(tl.float32)[:, None]
    out = out_ptr + local.to(tl.int64)[:, None] * out_row
    if FP8:
        offs_i = step * BLOCK_I + tl.arange(0, BLOCK_I)
        inside = in_o & (offs_i < INPUTS)[None, :]
        raw = tl.load(w_ptr + w_at[:, None] + offs_i[None, :] * w_input, mask=inside, other=0)
        value = raw.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale
        tl.store(out + offs_i[None, :] * out_input, value.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        offs_h = tl.arange(0, half)
        raw = tl.load(w_ptr + w_at[:, None] + (step * half + offs_h)[None, :] * w_input)
        zero = tl.load(zero_ptr + scale_at + group * rows).to(tl.float32)[:, None]
        low = ((raw & 15).to(tl.float32) - zero) * scale
        high = ((raw >> 4).to(tl.float32) - zero) * scale
        out += (step * BLOCK_I + offs_h)[None, :] * out_input
        tl.store(out, low.to(out_ptr.dtype.element_ty), mask=in_o)
        tl.store(out + half * out_input, high.to(out_ptr.dtype.element_ty), mask=in_o)


@dataclass(frozen=True)
class Tile:
    """A launch shape. `block_i` is for FP8; a tile of 4-bit weights is a run of inputs deep."""

    block_t: int
    block_o: int
    block_i: int
    warps: int
    stages: int


TILES: tuple[Tile, ...] = (
    Tile(16, 64, 128, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(64, 64, 128, 4, 3),
    Tile(128, 128, 64, 8, 3),
)
"""By tokens: the first whose `block_t` holds them all, else the last."""


def tile_of(tokens: int) -> Tile:
    """The launch shape for so many tokens."""
    return next((tile for tile in TILES if tokens <= tile.block_t), TILES[-1])


def choose_splits(outputs: int, inputs: int, tokens: int, tile: Tile, num_sms: int) -> int:
    """Parts to cut the inputs into: a power of two that fills the processors about twice, while a
    part has at least four tiles of inputs."""
    programs = -(-outputs // tile.block_o) * -(-tokens // tile.block_t)
    splits = 1
    while (
        splits < MAX_SPLITS
        and programs * splits < 2 * num_sms
        and inputs >= 8 * splits * tile.block_i
    ):
        splits *= 2
    return splits


class TritonQuantMatmul:
    """`kernels.quant_weight.QuantMatmul` by the kernels above, for tensors of one device.

    `prefill`: "fused" always reads the quantized bytes, "scratch" always dequantizes first, "auto"
    goes by the number of tokens. `tile` and `splits` overrule the tables (for measurements).
    """

    def __init__(
        self,
        num_sms: int,
        *,
        prefill: Literal["auto", "fused", "scratch"] = "auto",
        fp8: bool = True,
        prefill_tokens: int = PREFILL_TOKENS,
        tile: Tile | None = None,
        splits: int | None = None,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        """fp8: the device converts FP8 (compute capability 8.9); else torch does, into scratch.

        prefill_tokens: from so many tokens on "auto" dequantizes first.
        """
        self._num_sms = num_sms
        self._prefill = prefill
        self._fp8 = fp8
        self._prefill_tokens = prefill_tokens
        self._tile = tile
        self._splits = splits
        self._scratch_bytes = scratch_bytes

    def __call__(
        self, x_TI: torch.Tensor, weight: QuantWeight, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        tokens = x_TI.shape[0]
        scratch = self._prefill == "scratch" or (
            self._prefill == "auto" and tokens >= self._prefill_tokens
        )
        if tokens == 0:
            return x_TI.new_empty((0, weight.outputs))
        if scratch or not self._has_kernel(weight, x_TI.dtype):
            return self.by_scratch(x_TI, weight, bias_O)
        return self.fused(x_TI, weight, bias_O)

    def fused(
        self, x_TI: torch.Tensor, weight: QuantWeight, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        """By the fused kernel."""
        tokens, outputs = x_TI.shape[0], weight.outputs
        if x_TI.stride(1) != 1:
            x_TI = x_TI.contiguous()
        tile = self._tile or tile_of(tokens)
        fp8 = weight.kind == "fp8"
        block_i = min(tile.block_i, weight.group) if fp8 else weight.run
        splits = self._splits or choose_splits(outputs, weight.inputs, tokens, tile, self._num_sms)
        out_TO = x_TI.new_empty((tokens, outputs))
        to = (
            out_TO
            if splits == 1
            else x_TI.new_empty((splits, tokens, outputs), dtype=torch.float32)
        )
        _matmul_kernel[
            (triton.cdiv(outputs, tile.block_o), triton.cdiv(tokens, tile.block_t), splits)
        ](
            x_TI,
            weight.data,
            weight.scale,
            weight.data if weight.zero is None else weight.zero,
            out_TO if bias_O is None else bias_O,
            to,
            tokens,
            weight.data.shape[1],
            outputs,
            x_TI.stride(0),
            *weight.data.stride(),
            INPUTS=weight.inputs,
            GROUP=weight.group,
            FP8=fp8,
            TILED=weight.data.shape[1] % tile.block_o == 0,
            ALIGNED=weight.data.shape[1] % 16 == 0,
            SPLITS=splits,
            HAS_BIAS=bias_O is not None and splits == 1,
            BLOCK_T=tile.block_t,
            BLOCK_O=tile.block_o,
            BLOCK_I=_tile_inputs(block_i),
            num_warps=tile.warps,
            num_stages=min(tile.stages, 2) if x_TI.element_size() == 4 else tile.stages,
        )
        if splits > 1:
            _sum_kernel[(triton.cdiv(tokens * outputs, 1024),)](
                to,
                out_TO if bias_O is None else bias_O,
                out_TO,
                tokens * outputs,
                outputs,
                SPLITS=splits,
                HAS_BIAS=bias_O is not None,
                BLOCK=1024,
                num_warps=4,
            )
        return out_TO

    def by_scratch(
        self, x_TI: torch.Tensor, weight: QuantWeight, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        """By dequantizing a part of the outputs at a time."""
        tokens, outputs = x_TI.shape[0], weight.outputs
        out_TO = x_TI.new_empty((tokens, outputs))
        step = max(1, self._scratch_bytes // (weight.inputs * x_TI.element_size() * 256)) * 256
        for first in range(0, outputs, step):
            end = min(first + step, outputs)
            part_IO = self.dequantized(weight, first, end, x_TI.dtype).t()
            to = out_TO[:, first:end]
            if bias_O is None:
                torch.mm(x_TI, part_IO, out=to)
            else:
                torch.addmm(bias_O[first:end], x_TI, part_IO, out=to)
        return out_TO

    def dequantized(
        self, weight: QuantWeight, first: int, end: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Outputs first .. end - 1 as numbers, [O', I], dense in the axis that the image's is."""
        if not self._has_kernel(weight, dtype):
            return dequantize(weight, dtype)[first:end]
        rows, inputs = end - first, weight.inputs
        input_major = weight.data.stride(2) != 1
        kwargs = {"dtype": dtype, "device": weight.data.device}
        if input_major:
            out_OI = torch.empty((inputs, rows), **kwargs).t()
        else:
            out_OI = torch.empty((rows, inputs), **kwargs)
        block_o, block_i = (128, 32) if input_major else (32, 128)
        fp8 = weight.kind == "fp8"
        block_i = _tile_inputs(min(block_i, weight.group)) if fp8 else weight.run
        _dequantize_kernel[(triton.cdiv(rows, block_o), triton.cdiv(inputs, block_i))](
            weight.data,
            weight.scale,
            weight.data if weight.zero is None else weight.zero,
            out_OI,
            first,
            rows,
            weight.data.shape[1],
            weight.outputs,
            *weight.data.stride(),
            *out_OI.stride(),
            INPUTS=inputs,
            GROUP=weight.group,
            FP8=fp8,
            TILED=first % block_o == 0 and weight.data.shape[1] % block_o == 0,
            ALIGNED=first % 16 == 0 and weight.data.shape[1] % 16 == 0,
            BLOCK_O=block_o,
            BLOCK_I=block_i,
            num_warps=4,
        )
        return out_OI

    def _has_kernel(self, weight: QuantWeight, dtype: torch.dtype) -> bool:
        return dtype != torch.float64 and (weight.kind != "fp8" or self._fp8)


def _tile_inputs(limit: int) -> int:
    """The largest power of two that is at most `limit`, 16 at least."""
    return max(16, 1 << (limit.bit_length() - 1))

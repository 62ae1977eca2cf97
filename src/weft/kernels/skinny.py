"""Matrix products of few rows: as fast as the weights can be read.

At so few rows a product is bound by memory, and cuBLAS leaves 10 to 25 % of the bandwidth unused on
Hopper at the shapes of a 7B model (docs/lab.md). Here each program holds 64 outputs of all rows
and streams its part of the weights. Where the outputs alone are too few programs to fill the
device, the inputs are cut too: the last program of an output block to finish adds the parts up, in
their order, whoever it is. So the result is a function of the shapes alone.

Shape legend: T tokens, I inputs, O outputs, S splits of the inputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MAX_ROWS = 32
BLOCK_O = 64
PROGRAMS = 528
"""Four for each SM of an H200."""
MIN_WEIGHTS = 4 << 20
MIN_INPUTS = 256
"""A split reads at least so many inputs."""


@triton.jit(do_not_specialize=["rows"])
def _skinny_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    part_ptr,
    count_ptr,
    rows,
    inputs,
    outputs,
    x_stride,
    w_stride,
    out_stride,
    SPAN: tl.constexpr,
    SPLITS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Grid (ceil(O / BLOCK_O), S). w is [I, O] if TRANSPOSED, else [O, I]."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    offs_o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tl.arange(0, BLOCK_I)
    offs_t = tl.arange(0, BLOCK_T)
    in_o, in_t = offs_o < outputs, offs_t < rows
    end = tl.minimum((split + 1) * SPAN, inputs)
    acc = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32)
    for start in range(split * SPAN, end, BLOCK_I):
        at = start + offs_i
        in_i = at < end
        x = tl.load(
            x_ptr + offs_t[None, :] * x_stride + at[:, None],
            mask=in_t[None, :] & in_i[:, None],
            other=0.0,
        )
        if TRANSPOSED:
            w = tl.load(
                w_ptr + at[:, None].to(tl.int64) * w_stride + offs_o[None, :],
                mask=in_i[:, None] & in_o[None, :],
                other=0.0,
            )
            acc += tl.dot(tl.trans(w), x)
        else:
            w = tl.load(
                w_ptr + offs_o[:, None].to(tl.int64) * w_stride + at[None, :],
                mask=in_o[:, None] & in_i[None, :],
                other=0.0,
            )
            acc += tl.dot(w, x)
    last = True
    if SPLITS > 1:
        tile = tl.arange(0, BLOCK_O)[:, None] * BLOCK_T + offs_t[None, :]
        parts = part_ptr + block * SPLITS * BLOCK_O * BLOCK_T + tile
        tl.store(parts + split * BLOCK_O * BLOCK_T, acc)
        # All threads' parts are written before the one that counts says so.
        tl.debug_barrier()
        last = tl.atomic_add(count_ptr + block, 1, sem="acq_rel") == SPLITS - 1
        if last:
            acc = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32)
            # Unrolled: all loads are under way before the first sum.
            for i in tl.static_range(SPLITS):
                acc += tl.load(parts + i * BLOCK_O * BLOCK_T, cache_modifier=".cg")
            tl.store(count_ptr + block, 0)
    if last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_o, mask=in_o, other=0.0).to(tl.float32)[:, None]
        tl.store(
            out_ptr + offs_t[None, :] * out_stride + offs_o[:, None],
            acc.to(out_ptr.dtype.element_ty),
            mask=in_o[:, None] & in_t[None, :],
        )


@dataclass(frozen=True)
class Scratch:
    """What the programs of one product tell each other. Of one stream: products in order."""

    parts: torch.Tensor
    """float32."""
    counts: torch.Tensor
    """int32, zero between products."""

    @classmethod
    def make(cls, device: torch.device) -> "Scratch":
        # splits() keeps blocks * splits below PROGRAMS plus one split for each block.
        parts = 2 * PROGRAMS * BLOCK_O * MAX_ROWS
        return cls(
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.zeros(PROGRAMS, dtype=torch.int32, device=device),
        )


def pays(rows: int, inputs: int, outputs: int) -> bool:
    """Whether this is faster than cuBLAS: beyond 16 rows adding up the parts of split inputs costs
    more than is won."""
    if rows > MAX_ROWS or inputs < MIN_INPUTS or inputs * outputs < MIN_WEIGHTS:
        return False
    return rows <= 16 or splits(inputs, outputs)[0] == 1


def splits(inputs: int, outputs: int) -> tuple[int, int]:
    """Pieces the inputs are cut into, and inputs of a piece (a multiple of 64)."""
    blocks = triton.cdiv(outputs, BLOCK_O)
    wanted = max(1, min(triton.cdiv(PROGRAMS, blocks), inputs // MIN_INPUTS))
    if blocks >= PROGRAMS:
        wanted = 1
    span = triton.cdiv(triton.cdiv(inputs, wanted), 64) * 64
    return triton.cdiv(inputs, span), span


def skinny_mm(
    x_TI: torch.Tensor,
    weight_IO: torch.Tensor,
    bias_O: torch.Tensor | None,
    scratch: Scratch,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight + bias, [T, O] in x's dtype, T at most MAX_ROWS; sums in float32.

    weight_IO is contiguous along either axis; x has unit stride in I, out in O.
    """
    rows, inputs = x_TI.shape
    outputs = weight_IO.shape[1]
    transposed = weight_IO.stride(1) == 1
    if out is None:
        out = torch.empty((rows, outputs), dtype=x_TI.dtype, device=x_TI.device)
    pieces, span = splits(inputs, outputs)
    few = rows <= 16
    _skinny_kernel[(triton.cdiv(outputs, BLOCK_O), pieces)](
        x_TI,
        weight_IO,
        x_TI if bias_O is None else bias_O,
        out,
        scratch.parts,
        scratch.counts,
        rows,
        inputs,
        outputs,
        x_TI.stride(0),
        weight_IO.stride(0) if transposed else weight_IO.stride(1),
        out.stride(0),
        SPAN=span,
        SPLITS=pieces,
        TRANSPOSED=transposed,
        HAS_BIAS=bias_O is not None,
        BLOCK_T=16 if few else 32,
        BLOCK_O=BLOCK_O,
        BLOCK_I=64 if few else 128,
        num_warps=4,
        num_stages=3,
    )
    return out

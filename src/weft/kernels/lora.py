"""LoRA for many adapters at once: two launches a product, whatever number of adapters is in the
step (grouped as in Punica's SGMV, arXiv:2310.18547). The torch twin is `models.lora.TorchLora`.

A program takes one block of up to 16 tokens of one adapter. It finds the adapter's matrices by
address in the adapter's table, so that nothing about adapters is in the launch: the same launch
serves any mix. A token's result is a row of a matrix product of fixed tile sizes and does not
depend on what the other rows hold.

Shape legend: T tokens of a block, I inputs, O outputs, R rank.
"""

from typing import Any, Protocol

import torch
import triton
import triton.language as tl

BLOCK_RANK = 16
BLOCK_INPUTS = 128
BLOCK_OUTPUTS = 128


class Batch(Protocol):
    """What these kernels need of `models.lora.LoraBatch`."""

    @property
    def tokens_N(self) -> torch.Tensor: ...

    @property
    def blocks_B3(self) -> torch.Tensor: ...

    @property
    def block_tokens(self) -> int: ...

    def rank(self, layer: int, part: str) -> int: ...

    def place(self, layer: int, part: str) -> int: ...


@triton.jit
def _block(blocks_ptr, tokens_ptr, place, BLOCK_T: tl.constexpr):
    """This program's block: the adapter's entry for this product, places of the tokens, rank."""
    entry_ptr = blocks_ptr + tl.program_id(0) * 3
    table_ptr = tl.load(entry_ptr).to(tl.pointer_type(tl.int64)) + place * 3
    first = tl.load(entry_ptr + 1)
    count = tl.load(entry_ptr + 2)
    rows = tl.arange(0, BLOCK_T)
    live = rows < count
    tokens = tl.load(tokens_ptr + first + rows, mask=live, other=0)
    # A block of no token has nothing to do, and its address may be none.
    rank = tl.load(table_ptr + 2, mask=count > 0, other=0).to(tl.int32)
    return table_ptr, first + rows, live, tokens, rank


@triton.jit
def _shrink(
    x_ptr,
    low_ptr,
    blocks_ptr,
    tokens_ptr,
    place,
    inputs,
    x_stride,
    low_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """low = x a^T: one program per block and tile of the rank."""
    table_ptr, entries, live, tokens, rank = _block(blocks_ptr, tokens_ptr, place, BLOCK_T)
    first_rank = tl.program_id(1) * BLOCK_R
    if first_rank < rank:
        a_ptr = tl.load(table_ptr).to(tl.pointer_type(x_ptr.dtype.element_ty))
        ranks = first_rank + tl.arange(0, BLOCK_R)
        low = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for at in range(0, inputs, BLOCK_I):
            columns = at + tl.arange(0, BLOCK_I)
            inside = columns < inputs
            x = tl.load(
                x_ptr + tokens[:, None] * x_stride + columns[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            a = tl.load(
                a_ptr + ranks[None, :] * inputs + columns[:, None], mask=inside[:, None], other=0.0
            )
            low = tl.dot(x, a, low, input_precision="ieee")
        tl.store(
            low_ptr + entries[:, None] * low_stride + ranks[None, :],
            low.to(low_ptr.dtype.element_ty),
            mask=live[:, None],
        )


@triton.jit
def _expand(
    low_ptr,
    y_ptr,
    blocks_ptr,
    tokens_ptr,
    place,
    outputs,
    low_stride,
    y_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y += low b^T: one program per block and tile of the outputs."""
    table_ptr, entries, live, tokens, rank = _block(blocks_ptr, tokens_ptr, place, BLOCK_T)
    if rank > 0:
        b_ptr = tl.load(table_ptr + 1).to(tl.pointer_type(y_ptr.dtype.element_ty))
        columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        inside = columns < outputs
        delta = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
        for at in range(0, rank, BLOCK_R):
            ranks = at + tl.arange(0, BLOCK_R)
            low = tl.load(
                low_ptr + entries[:, None] * low_stride + ranks[None, :],
                mask=live[:, None],
                other=0.0,
            )
            b = tl.load(
                b_ptr + columns[None, :] * rank + ranks[:, None], mask=inside[None, :], other=0.0
            )
            delta = tl.dot(low, b, delta, input_precision="ieee")
        where = y_ptr + tokens[:, None] * y_stride + columns[None, :]
        mask = live[:, None] & inside[None, :]
        y = tl.load(where, mask=mask, other=0.0)
        tl.store(where, (y + delta).to(y_ptr.dtype.element_ty), mask=mask)


class TritonLora:
    """Implements `models.lora.LoraOps` for bfloat16, float16 and float32."""

    def add(
        self, y_TO: torch.Tensor, x_TI: torch.Tensor, batch: Batch, layer: int, part: str
    ) -> None:
        assert x_TI.stride(1) == y_TO.stride(1) == 1
        rank, count = batch.rank(layer, part), batch.blocks_B3.shape[0]
        place = batch.place(layer, part)
        low_NR = torch.empty((batch.tokens_N.shape[0], rank), dtype=x_TI.dtype, device=x_TI.device)
        shrink: Any = _shrink
        shrink[(count, rank // BLOCK_RANK)](
            x_TI,
            low_NR,
            batch.blocks_B3,
            batch.tokens_N,
            place,
            x_TI.shape[1],
            x_TI.stride(0),
            rank,
            BLOCK_T=batch.block_tokens,
            BLOCK_I=BLOCK_INPUTS,
            BLOCK_R=BLOCK_RANK,
        )
        expand: Any = _expand
        expand[(count, triton.cdiv(y_TO.shape[1], BLOCK_OUTPUTS))](
            low_NR,
            y_TO,
            batch.blocks_B3,
            batch.tokens_N,
            place,
            y_TO.shape[1],
            rank,
            y_TO.stride(0),
            BLOCK_T=batch.block_tokens,
            BLOCK_O=BLOCK_OUTPUTS,
            BLOCK_R=BLOCK_RANK,
        )

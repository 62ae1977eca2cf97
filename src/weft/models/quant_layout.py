"""How a quantized matrix lies in the weight image. Pure.

A matrix keeps the place and the order of rows that it has unquantized (`layout`): output-major
[..., O, I], or input-major [I, O] for `o` and `down`. What changes is the bytes, and two tensors
follow it:

    fp8     X            the shape it had, one byte a weight (E4M3)
    int4    X            half as many inputs: one byte holds two of them
            X.zero       [N, I/S, R] uint8: zero points, 0 .. 16
    both    X.scale      [N, I/S, R]

Inputs are packed in runs of P = 128, 64 or 32 (the largest that divides a group): byte j of a run
holds input j in its low and input j + P/2 in its high half, so that both halves of a tile of bytes
are whole runs of inputs and nothing has to be shuffled on the device.

Scales are cut as the rows are: N blocks (KV heads for qkv, gate/up blocks, 1 for `o` and `down`)
of R outputs each, so every tensor-parallel slice of the weights has its scales in one range: a
block, or rows of the one block there is. A weight is (code - zero) * scale, or fp8 * scale.

Shape legend: O outputs, I inputs, S inputs that share a scale, N blocks, R = O / N.
"""

from typing import NamedTuple

from weft.core.model import Architecture, QuantSpec

MATRIX_PARTS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""Matrices of a layer that may be quantized, and their parts in the checkpoint (`names`)."""
RUNS = (128, 64, 32)
"""Inputs packed together, the best first."""


class QuantTensor(NamedTuple):
    """One tensor of a matrix in the image."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: str | None


def is_quantized(arch: Architecture, name: str) -> bool:
    """Whether the tensor of this name in the image is a quantized matrix."""
    if arch.quant is None or name.rpartition(".")[2] not in MATRIX_PARTS:
        return False
    return name not in arch.quant.dense


def group_inputs(quant: QuantSpec, inputs: int) -> int:
    """Inputs of a matrix that share a scale."""
    return quant.group_size or inputs


def run_inputs(quant: QuantSpec, inputs: int) -> int:
    """Inputs packed together in a 4-bit matrix (P), 0 if none fits."""
    group = group_inputs(quant, inputs)
    return next((run for run in RUNS if group % run == 0), 0)


def matrix_tensors(
    quant: QuantSpec, name: str, shape: tuple[int, ...], *, blocks: int, transposed: bool
) -> list[QuantTensor]:
    """The tensors of a matrix whose unquantized shape is `shape`: [..., I], or [I, O] where
    `transposed`; its first axis is of `blocks` blocks unless transposed."""
    inputs = shape[0] if transposed else shape[-1]
    outputs = 1
    for size in shape:
        outputs *= size
    outputs //= inputs
    scales = (blocks, inputs // group_inputs(quant, inputs), outputs // blocks)
    after = QuantTensor(f"{name}.scale", scales, quant.scale_dtype, None)
    if quant.kind == "fp8":
        return [QuantTensor(name, shape, "float8_e4m3", after.name), after]
    half = inputs // 2
    packed = (half, *shape[1:]) if transposed else (*shape[:-1], half)
    return [
        QuantTensor(name, packed, "uint8", after.name),
        QuantTensor(f"{name}.zero", scales, "uint8", None),
        after,
    ]

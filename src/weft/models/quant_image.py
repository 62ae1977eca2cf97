"""Quantized matrices between checkpoint and image: what config.json and the headers say together,
and the work that packs them. numpy only.

Shape legend: O outputs, I inputs, S inputs that share a scale, N blocks of outputs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from weft.core.model import Architecture, QuantSpec
from weft.models.convert import convert
from weft.models.names import Source, expected_tensors, tensor_name
from weft.models.quant import QuantModule
from weft.models.quant_config import quant_spec, read_claim
from weft.models.quant_layout import MATRIX_PARTS, is_quantized
from weft.models.safetensors_file import Checkpoint, open_checkpoint

SLAB_BYTES = 4 << 20
"""Codes unpacked at a time, about."""
QuantWork = Callable[[], int]
"""Something to be done once, on any thread; returns the bytes it wrote."""


def read_quant(path: Path, arch: Architecture, where: str, config: object) -> QuantSpec:
    """How the model in folder `path` is quantized: `config` is its quantization_config. Reads
    headers. Raises WeftError for what is not supported."""
    claim = read_claim(where, config)
    matrices = {
        f"layers.{i}.{name}": _modules_of(arch, f"layers.{i}.{name}")
        for i in range(arch.num_layers)
        for name in MATRIX_PARTS
    }
    shapes = {_module(name): shape for name, shape in expected_tensors(arch).items()}
    with open_checkpoint(path) as checkpoint:
        return quant_spec(claim, checkpoint, matrices, shapes)


def quant_modules(checkpoint: Checkpoint, arch: Architecture) -> dict[str, QuantModule]:
    """Every quantized module of the checkpoint by its name."""
    quant = arch.quant
    if quant is None:
        return {}
    shapes = expected_tensors(arch)
    names = dict.fromkeys(
        module
        for i in range(arch.num_layers)
        for name in MATRIX_PARTS
        if is_quantized(arch, f"layers.{i}.{name}")
        for module in _modules_of(arch, f"layers.{i}.{name}")
    )
    return {
        module: QuantModule(checkpoint, quant, module, *shapes[f"{module}.weight"])
        for module in names
    }


class QuantPart(NamedTuple):
    """A part of a matrix (`names`) and its places in the image."""

    module: QuantModule
    rows: slice
    """Outputs of the module."""
    weight: np.ndarray
    """[..., I or I / 2], or [I or I / 2, O] where `transposed`."""
    scale: np.ndarray
    """[N, I / S, outputs a block]."""
    zero: np.ndarray | None
    transposed: bool

    def write_scales(self, dtype: str) -> int:
        """Returns the bytes written."""
        scales, stored = self.module.scales()
        self.scale[...] = convert(self._by_block(scales), stored, dtype)
        return self.scale.nbytes

    def write_zeros(self) -> int:
        """Returns the bytes written."""
        assert self.zero is not None
        self.zero[...] = self._by_block(self.module.zeros())
        return self.zero.nbytes

    def packing(self) -> Iterator[QuantWork]:
        """4 bits: the work of packing the weights."""
        module, rows = self.module, self.rows
        dest = self.weight if self.transposed else np.moveaxis(self.weight, -1, 0)
        if module.by_output:
            each = (rows.stop - rows.start) // dest.shape[1]
            step = max(1, SLAB_BYTES // (each * module.inputs))
            for at in range(0, dest.shape[1], step):
                first, part = rows.start + at * each, dest[:, at : at + step]
                outputs = slice(first, first + part.shape[1] * each)
                yield partial(self._pack, slice(0, module.inputs), outputs, part)
            return
        step = max(1, SLAB_BYTES // (module.run * module.outputs)) * module.run
        for at in range(0, module.inputs, step):
            inputs = slice(at, min(at + step, module.inputs))
            yield partial(self._pack, inputs, rows, dest[at // 2 : inputs.stop // 2])

    def _pack(self, inputs: slice, outputs: slice, dest: np.ndarray) -> int:
        packed = self.module.packed(inputs, outputs)
        dest[...] = packed.reshape(dest.shape)
        return dest.nbytes

    def _by_block(self, values_GO: np.ndarray) -> np.ndarray:
        cut = values_GO[:, self.rows]
        return cut.reshape(cut.shape[0], self.scale.shape[0], -1).transpose(1, 0, 2)


def quant_parts(
    modules: dict[str, QuantModule],
    places: dict[str, Source],
    name: str,
    tensors: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    part_rows: dict[str, slice],
) -> Iterator[QuantPart]:
    """The parts of a quantized matrix of the image. tensors: its weight, scale and zero there;
    part_rows: rows of q, k and v in a KV head's."""
    layer, _, own = name.rpartition(".")
    weight, scale, zero = tensors
    for i, part in enumerate(MATRIX_PARTS[own]):
        source = places[f"{layer}.{part}"]
        module = modules[_module(source.tensor)]
        rows = slice(source.first_row, source.first_row + source.shape[0])
        if own == "qkv":
            cut = (slice(None), slice(None), part_rows[part])
            yield QuantPart(
                module,
                rows,
                weight[:, part_rows[part]],
                scale[cut],
                None if zero is None else zero[cut],
                False,
            )
        elif own == "gate_up":
            blocks, groups, _ = scale.shape
            halves = scale.reshape(blocks, groups, 2, -1)[:, :, i]
            zeros = None if zero is None else zero.reshape(blocks, groups, 2, -1)[:, :, i]
            yield QuantPart(module, rows, weight[:, i], halves, zeros, False)
        else:
            yield QuantPart(module, rows, weight, scale, zero, True)


def _modules_of(arch: Architecture, name: str) -> tuple[str, ...]:
    """Modules of the checkpoint that make a matrix of the image."""
    layer, _, own = name.rpartition(".")
    places = (tensor_name(arch, f"{layer}.{part}") for part in MATRIX_PARTS[own])
    return tuple(dict.fromkeys(_module(tensor) for tensor in places))


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")

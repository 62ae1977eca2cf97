"""Quantized matrices of an image as tensors, and their products in plain torch.

Shape legend: T tokens, O outputs, I inputs, N blocks of R = O / N outputs, S inputs that share a
scale, P inputs of a run of packed bytes (`quant_layout`).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch


@dataclass(frozen=True)
class QuantWeight:
    """Views over the image; nothing is read when they are made."""

    kind: Literal["fp8", "int4"]
    data: torch.Tensor
    """uint8 [N, R, I] (fp8) or [N, R, I / 2] (int4), strided: dense in the last axis, or in the
    one before where the image has it input-major."""
    scale: torch.Tensor
    """[N, I / S, R], contiguous."""
    zero: torch.Tensor | None
    """int4: uint8, as `scale`."""
    inputs: int
    run: int
    """int4: P."""

    @property
    def outputs(self) -> int:
        return self.data.shape[0] * self.data.shape[1]

    @property
    def group(self) -> int:
        """S."""
        return self.inputs // self.scale.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, scales and zero points."""
        tensors = (
            (self.data, self.scale) if self.zero is None else (self.data, self.scale, self.zero)
        )
        return sum(one.numel() * one.element_size() for one in tensors)


class QuantMatmul(Protocol):
    """How products with quantized matrices are done on a device. Stateless."""

    def __call__(
        self, x_TI: torch.Tensor, weight: QuantWeight, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        """x @ weight.T (+ bias), [T, O] in x's dtype."""
        ...


def dequantize(weight: QuantWeight, dtype: torch.dtype) -> torch.Tensor:
    """[O, I]: (code - zero) * scale, or fp8 * scale, in float32 and rounded to `dtype`; in float64
    throughout for float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale_NRI = _spread(weight.scale.to(wide), weight.group)
    if weight.kind == "fp8":
        return (weight.data.view(torch.float8_e4m3fn).to(wide) * scale_NRI).to(dtype).flatten(0, 1)
    assert weight.zero is not None
    halves = weight.data.unflatten(-1, (-1, weight.run // 2))
    codes_NRI = torch.cat((halves & 15, halves >> 4), dim=-1).flatten(-2)
    zero_NRI = _spread(weight.zero.to(wide), weight.group)
    return ((codes_NRI.to(wide) - zero_NRI) * scale_NRI).to(dtype).flatten(0, 1)


def _spread(values_NGR: torch.Tensor, group: int) -> torch.Tensor:
    """[N, I / S, R] -> [N, R, I]."""
    return values_NGR.transpose(1, 2).repeat_interleave(group, dim=-1)


class TorchQuantMatmul:
    """Dequantizes the whole matrix each time: exact about what is meant, on any device."""

    def __call__(
        self, x_TI: torch.Tensor, weight: QuantWeight, bias_O: torch.Tensor | None
    ) -> torch.Tensor:
        matrix_IO = dequantize(weight, x_TI.dtype).t()
        if bias_O is None:
            return torch.mm(x_TI, matrix_IO)
        return torch.addmm(bias_O, x_TI, matrix_IO)

"""Matrix products with weights of an image: the seam for quantized formats.

Shape legend: T tokens, I inputs, O outputs.
"""

from typing import Protocol

import torch

from weft.kernels.quant_weight import QuantMatmul, QuantWeight
from weft.models.ops import Ops


class Linear(Protocol):
    """x [T, I] -> [T, O], in x's dtype. Stateless: views over the image."""

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor: ...


class DenseLinear:
    """A weight in the model's dtype, stored [O, I], or [I, O] where `transposed`."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias_O: torch.Tensor | None = None,
        *,
        transposed: bool = False,
        ops: Ops,
    ) -> None:
        self._ops = ops
        self.weight_IO = weight if transposed else weight.t()
        self.bias_O = bias_O

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        return self._ops.product(x_TI, self.weight_IO, self.bias_O)


class QuantLinear:
    """A quantized weight; the device's `QuantMatmul` does the product."""

    def __init__(
        self, weight: QuantWeight, bias_O: torch.Tensor | None, matmul: QuantMatmul
    ) -> None:
        self.weight = weight
        self.bias_O = bias_O
        self._matmul = matmul

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        return self._matmul(x_TI, self.weight, self.bias_O)

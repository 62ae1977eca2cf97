"""The elementwise operations of the decoder, in torch. `Ops` is the seam for fused kernels.

Low dtypes compute norm and rotary in float32 as transformers does; float64 stays float64.

Shape legend: T tokens, H hidden size, D head dim, E rotary dim / 2, N heads, I intermediate size or
inputs, O outputs, B blocks.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from weft.core.model import Activation


class Ops(Protocol):
    """What a decoder layer does between its matrix products. Implementations are stateless."""

    def rms_norm(
        self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0
    ) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * (weight + offset), in x's dtype. With an offset (Gemma) the
        product is rounded once, without (Llama) the normed x is rounded before."""
        ...

    def add_rms_norm(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and that sum. May write into either argument."""
        ...

    def rotary(
        self, x_TND: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor
    ) -> torch.Tensor:
        """Rotate the first 2 E dimensions of each head (halves, not pairs, as transformers does).
        Returns a new contiguous tensor. cos and sin are [T, E], in x's dtype."""
        ...

    def product(
        self,
        x_TI: torch.Tensor,
        weight_IO: torch.Tensor,
        bias_O: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x @ weight + bias [T, O], in x's dtype; written into `out` if that is given."""
        ...

    def act_mul(self, gate_up_TB2I: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
        """activation(gate) * up: [T, B, 2, I / B] -> [T, I]."""
        ...


class TorchOps:
    """The plain implementation, on any device."""

    def rms_norm(
        self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float = 0.0
    ) -> torch.Tensor:
        wide = x_TH if x_TH.dtype == torch.float64 else x_TH.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if offset:
            return (wide * scale * (weight_H.to(wide.dtype) + offset)).to(x_TH.dtype)
        return weight_H * (wide * scale).to(x_TH.dtype)

    def add_rms_norm(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x_TH + residual_TH
        return self.rms_norm(total, weight_H, eps, offset), total

    def rotary(
        self, x_TND: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor
    ) -> torch.Tensor:
        half = cos_TE.shape[1]
        low, high, rest = x_TND.split((half, half, x_TND.shape[2] - 2 * half), dim=-1)
        cos, sin = cos_TE[:, None], sin_TE[:, None]
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)

    def product(
        self,
        x_TI: torch.Tensor,
        weight_IO: torch.Tensor,
        bias_O: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if bias_O is None:
            return torch.mm(x_TI, weight_IO, out=out)
        return torch.addmm(bias_O, x_TI, weight_IO, out=out)

    def act_mul(self, gate_up_TB2I: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
        gate, up = gate_up_TB2I.unbind(2)
        active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        return (active * up).reshape(gate.shape[0], -1)

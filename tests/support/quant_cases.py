"""Random quantized matrices in the image's form, without a checkpoint."""

from typing import cast

import torch

from weft.core.model import QuantSpec
from weft.kernels.quant_weight import QuantWeight
from weft.models.quant_layout import run_inputs


def quant_weight(
    kind: str,
    *,
    outputs: int,
    inputs: int,
    group: int,
    blocks: int,
    input_major: bool,
    seed: int = 0,
    scale_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> QuantWeight:
    """Weights of about unit size. group 0: one scale an output."""
    gen = torch.Generator().manual_seed(seed)
    rows = outputs // blocks
    spec = QuantSpec(
        form="fp8" if kind == "fp8" else "awq",
        kind="fp8" if kind == "fp8" else "int4",
        group_size=group,
        scale_dtype="float32",
    )
    scales = (blocks, inputs // (group or inputs), rows)
    scale = 0.5 + torch.rand(scales, generator=gen)
    if kind == "fp8":
        values = torch.randn((blocks, rows, inputs), generator=gen)
        data = values.to(torch.float8_e4m3fn).view(torch.uint8)
        zero = None
    else:
        data = torch.randint(0, 256, (blocks, rows, inputs // 2), generator=gen).to(torch.uint8)
        zero = torch.randint(0, 17, scales, generator=gen).to(torch.uint8).to(device)
        scale = scale / 6
    if input_major:
        data = data.transpose(1, 2).contiguous().transpose(1, 2)
    return QuantWeight(
        kind=spec.kind,
        data=cast(torch.Tensor, data.to(device)),
        scale=scale.to(device, scale_dtype),
        zero=zero,
        inputs=inputs,
        run=run_inputs(spec, inputs) if kind == "int4" else 0,
    )

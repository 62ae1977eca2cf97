"""Steps with adapters for kernels: random weights, no files."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from weft.core.model import AdapterShape, Architecture, RopeSpec
from weft.models.adapter import PARTS, adapter_layout, part_sizes
from weft.models.lora import LoraBatch, LoraWeights, TorchLora, batch_of, plan_lora

RANKS = (
    ((16, 16, 32, 16), (16, 48, 16, 16)),
    ((48, 0, 0, 16), (96, 16, 16, 16)),
    ((0, 0, 16, 0), (0, 0, 32, 0)),
)
"""Per adapter and layer."""


class LoraStep(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    batch: LoraBatch


def small_architecture(dtype: torch.dtype, *, hidden: int = 72, inner: int = 200) -> Architecture:
    return Architecture(
        family="llama",
        num_layers=2,
        hidden_size=hidden,
        intermediate_size=inner,
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=12,
        vocab_size=128,
        max_position=64,
        norm_eps=1e-5,
        rope=RopeSpec(),
        qkv_bias=False,
        tied_embeddings=False,
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )


def random_lora(
    arch: Architecture, ranks: Sequence[Sequence[int]], seed: int, device: str = "cpu"
) -> LoraWeights:
    """An adapter whose products have outputs about as large as their inputs."""
    shape = AdapterShape(ranks=tuple(tuple(layer) for layer in ranks))  # type: ignore[misc]
    size = adapter_layout(arch, shape).num_bytes
    weights = LoraWeights(arch, shape, torch.zeros(size, dtype=torch.uint8, device=device))
    generator = torch.Generator().manual_seed(seed)
    for views in (weights.a_RI, weights.b_OR):
        for view in views.values():
            noise = torch.randn(view.shape, generator=generator) / view.shape[1] ** 0.5
            view.copy_(noise.to(view.dtype))
    return weights


def mixed_step(
    dtype: torch.dtype,
    part: str,
    *,
    counts: Sequence[int],
    owners: Sequence[int | None],
    device: str = "cpu",
) -> LoraStep:
    """A step of rows with so many tokens and these adapters of RANKS, at layer 1."""
    arch = small_architecture(dtype)
    adapters = [random_lora(arch, ranks, i, device) for i, ranks in enumerate(RANKS)]
    rows = [
        (None if owner is None else adapters[owner], count)
        for owner, count in zip(owners, counts, strict=True)
    ]
    outputs, inputs = part_sizes(arch, part)
    generator = torch.Generator().manual_seed(PARTS.index(part))
    tokens = sum(counts)
    x, y = (torch.randn(tokens, size, generator=generator) for size in (inputs, outputs))
    batch = batch_of(plan_lora(rows), TorchLora(), device)
    return LoraStep(x.to(device, dtype), y.to(device, dtype), batch)

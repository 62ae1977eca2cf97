"""The LoRA kernels on the device against their torch twin, at sizes of real models."""

import pytest
import torch

from support.gpu import needs_gpu
from support.kernel_cases import relative_error
from support.lora_cases import mixed_step, random_lora, small_architecture
from weft.models.adapter import part_sizes
from weft.models.lora import LoraOps, TorchLora, batch_of, plan_lora

pytestmark = needs_gpu


PARTS = ("qkv", "o", "gate_up", "down")
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def triton_lora() -> LoraOps:
    from weft.kernels.lora import TritonLora

    return TritonLora()


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_small_odd_sizes(dtype: torch.dtype, part: str) -> None:
    counts, owners = (3, 1, 17, 33, 2), (None, 0, 1, 2, 0)
    step = mixed_step(dtype, part, counts=counts, owners=owners, device="cuda")
    ours, twin = step.y.clone(), step.y.clone()
    TorchLora().add(twin, step.x, step.batch, 1, part)
    triton_lora().add(ours, step.x, step.batch, 1, part)
    assert relative_error(ours, twin) < LIMITS[dtype]


@pytest.mark.parametrize("part", PARTS)
def test_many_adapters_decode_and_a_token_does_not_feel_the_others(part: str) -> None:
    """64 decode rows of 16 adapters on a model of 4096 x 11008, then each row alone: bit by bit."""
    arch = small_architecture(torch.bfloat16, hidden=4096, inner=11008)
    ranks = ((48, 16, 32, 16), (96, 32, 64, 32))
    adapters = [random_lora(arch, ranks, i, "cuda") for i in range(16)]
    outputs, inputs = part_sizes(arch, part)
    x = torch.randn(64, inputs, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(64, outputs, device="cuda", dtype=torch.bfloat16)
    owners = [adapters[i % 16] for i in range(64)]
    ours, twin = y.clone(), y.clone()
    batch = batch_of(plan_lora([(owner, 1) for owner in owners]), TorchLora(), "cuda")
    triton_lora().add(ours, x, batch, 1, part)
    TorchLora().add(twin, x, batch, 1, part)
    assert relative_error(ours, twin) < LIMITS[torch.bfloat16]
    for i in (0, 17, 63):
        alone = batch_of(plan_lora([(owners[i], 1)]), TorchLora(), "cuda")
        row = y[i : i + 1].clone()
        triton_lora().add(row, x[i : i + 1], alone, 1, part)
        assert torch.equal(row[0], ours[i])

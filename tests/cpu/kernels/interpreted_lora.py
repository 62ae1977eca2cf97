"""Run by test_kernels_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from support.kernel_cases import relative_error
from support.lora_cases import mixed_step

assert os.environ.get("TRITON_INTERPRET") == "1"

from weft.kernels.lora import TritonLora  # noqa: E402
from weft.models.lora import TorchLora  # noqa: E402

LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)


@DTYPES
@pytest.mark.parametrize("part", ["qkv", "o", "gate_up", "down"])
def test_adapters_and_the_bare_base_in_one_step(dtype: torch.dtype, part: str) -> None:
    """Groups of one token, of a block and of more; sizes that no tile divides; one adapter has
    nothing in some products."""
    step = mixed_step(dtype, part, counts=(3, 1, 17, 33, 2), owners=(None, 0, 1, 2, 0))
    ours, twin = step.y.clone(), step.y.clone()
    TorchLora().add(twin, step.x, step.batch, 1, part)
    TritonLora().add(ours, step.x, step.batch, 1, part)
    assert relative_error(ours, twin) < LIMITS[dtype]
    bare = torch.ones(len(ours), dtype=torch.bool)
    bare[step.batch.tokens_N] = False
    assert torch.equal(ours[bare], step.y[bare])


def test_a_token_does_not_feel_the_others() -> None:
    """Bit for bit: the same token alone in the step, and in a block with others."""
    part = "gate_up"
    step = mixed_step(torch.float16, part, counts=(5, 12), owners=(1, 1))
    together = step.y.clone()
    TritonLora().add(together, step.x, step.batch, 1, part)
    for token in (0, 4, 16):
        alone = mixed_step(torch.float16, part, counts=(1,), owners=(1,))
        y = step.y[token : token + 1].clone()
        TritonLora().add(y, step.x[token : token + 1].clone(), alone.batch, 1, part)
        assert torch.equal(y[0], together[token])

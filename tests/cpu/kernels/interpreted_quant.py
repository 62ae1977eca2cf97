"""Run by test_kernels_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from support.kernel_cases import relative_error
from support.quant_cases import quant_weight

assert os.environ.get("TRITON_INTERPRET") == "1"

from weft.kernels.quant_matmul import Tile, TritonQuantMatmul  # noqa: E402
from weft.kernels.quant_weight import TorchQuantMatmul, dequantize  # noqa: E402

TWIN = TorchQuantMatmul()
SMALL = Tile(16, 32, 32, 1, 1)
# The kernel does not round weights, its twin does: in float16 that is what they differ by.
LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3}
FORMS = pytest.mark.parametrize(
    ("kind", "group"), [("fp8", 0), ("fp8", 64), ("int4", 0), ("int4", 32), ("int4", 64)]
)
LAYOUTS = pytest.mark.parametrize(("blocks", "input_major"), [(2, False), (1, False), (1, True)])


@LAYOUTS
@FORMS
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_fused(kind: str, group: int, blocks: int, input_major: bool, dtype: torch.dtype) -> None:
    """Tiles that divide a block and that do not, splits, a bias or none."""
    for outputs, tokens, splits in ((80, 19, 1), (64, 3, 4)):
        weight = quant_weight(
            kind, outputs=outputs, inputs=128, group=group, blocks=blocks, input_major=input_major
        )
        bias = torch.randn(outputs).to(dtype) if splits > 1 else None
        x = torch.randn(tokens, 128).to(dtype)
        ours = TritonQuantMatmul(4, prefill="fused", tile=SMALL, splits=splits)
        assert relative_error(ours(x, weight, bias), TWIN(x, weight, bias)) < LIMITS[dtype]


def test_fused_with_odd_inputs() -> None:
    """FP8 with one scale an output has no rule for its inputs."""
    weight = quant_weight("fp8", outputs=33, inputs=70, group=0, blocks=1, input_major=False)
    x = torch.randn(3, 140)[:, ::2]
    ours = TritonQuantMatmul(4, tile=SMALL, splits=2)
    assert relative_error(ours(x, weight, None), TWIN(x, weight, None)) < 1e-6


@LAYOUTS
@FORMS
def test_scratch(kind: str, group: int, blocks: int, input_major: bool) -> None:
    """Parts that do not divide the outputs; the numbers are those of the twin, to the bit."""
    weight = quant_weight(
        kind, outputs=336, inputs=128, group=group, blocks=blocks, input_major=input_major
    )
    ours = TritonQuantMatmul(4, prefill="scratch", scratch_bytes=1)
    for dtype in (torch.float32, torch.float16):
        part = ours.dequantized(weight, 40, 301, dtype)
        assert torch.equal(part, dequantize(weight, dtype)[40:301])
    x, bias = torch.randn(3, 128), torch.randn(336)
    for b in (None, bias):
        assert relative_error(ours(x, weight, b), TWIN(x, weight, b)) < 1e-6


def test_every_fp8_number() -> None:
    """All 254 bytes that are numbers, subnormal ones too."""
    weight = quant_weight("fp8", outputs=256, inputs=16, group=0, blocks=1, input_major=False)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = 0  # the two that are not
    weight.data[0, :, 0] = codes
    weight.data[0, :, 1:] = 0
    x = torch.zeros(1, 16)
    x[0, 0] = 1
    out = TritonQuantMatmul(4, tile=SMALL)(x, weight, None)
    assert torch.equal(out, TWIN(x, weight, None))
    assert len(out.unique()) == 253


def test_no_tokens_and_float64() -> None:
    weight = quant_weight("int4", outputs=8, inputs=64, group=32, blocks=1, input_major=True)
    ours = TritonQuantMatmul(4)
    assert ours(torch.randn(0, 64), weight, None).shape == (0, 8)
    x = torch.randn(2, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x, weight, None), TWIN(x, weight, None))


def test_many_tokens_take_the_scratch() -> None:
    """ "auto" is one or the other to the bit, by the number of tokens."""
    weight = quant_weight("int4", outputs=64, inputs=64, group=32, blocks=2, input_major=False)
    ways = {
        name: TritonQuantMatmul(4, prefill=name, tile=SMALL, prefill_tokens=3)
        for name in ("auto", "fused", "scratch")
    }
    for tokens, way in ((2, "fused"), (3, "scratch")):
        x = torch.randn(tokens, 64).half()
        out = {name: how(x, weight, None) for name, how in ways.items()}
        assert torch.equal(out["auto"], out[way])
        assert not torch.equal(out["fused"], out["scratch"])

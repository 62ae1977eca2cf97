"""Quantized products and models on the device, against float32 and against the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from support.gpu import needs_gpu, to_cuda
from support.kernel_cases import relative_error
from support.plain import PlainModel, make_batch, packed_weights
from support.quant_cases import quant_weight
from support.quant_tiny import FORMS, quant_checkpoint
from weft.attention.reference import ReferenceAttention
from weft.kernels.quant_weight import QuantWeight, dequantize

pytestmark = needs_gpu

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
SCRATCH_LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""With scratch, weights are rounded as well as outputs."""
SHAPES = [
    # kind, outputs, inputs, group, blocks, input_major
    ("fp8", 4608, 3584, 0, 4, False),
    ("fp8", 3584, 1088, 0, 1, True),
    ("fp8", 1024, 3584, 128, 8, False),
    ("fp8", 200, 70, 0, 1, False),
    ("int4", 4608, 3584, 128, 4, False),
    ("int4", 3584, 2048, 128, 1, True),
    ("int4", 1024, 1024, 32, 8, False),
    ("int4", 520, 1056, 0, 1, True),
]


def case(
    shape: tuple[str, int, int, int, int, bool], tokens: int, dtype: torch.dtype
) -> tuple[QuantWeight, torch.Tensor, torch.Tensor]:
    kind, outputs, inputs, group, blocks, input_major = shape
    weight = quant_weight(
        kind,
        outputs=outputs,
        inputs=inputs,
        group=group,
        blocks=blocks,
        input_major=input_major,
        scale_dtype=torch.float16,
        device="cuda",
    )
    gen = torch.Generator(device="cuda").manual_seed(tokens)
    x = torch.randn(tokens, inputs, generator=gen, device="cuda").to(dtype)
    return weight, x, torch.randn(outputs, generator=gen, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[str, int, int, int, int, bool], dtype: torch.dtype) -> None:
    """Both ways, every tile of the table, with and without a bias; the same launch, the same
    bits."""
    from weft.kernels.quant_matmul import TritonQuantMatmul

    for tokens in (1, 7, 16, 33, 64, 200, 300):
        weight, x, bias = case(shape, tokens, dtype)
        ref = x.double() @ dequantize(weight, torch.float64).t()
        fused = TritonQuantMatmul(132, prefill="fused")
        out = fused(x, weight, None)
        assert relative_error(out, ref) < LIMITS[dtype]
        assert torch.equal(fused(x, weight, None), out)
        assert relative_error(fused(x, weight, bias), ref + bias) < LIMITS[dtype]
        scratch = TritonQuantMatmul(132, prefill="scratch", scratch_bytes=1 << 20)
        assert relative_error(scratch(x, weight, bias), ref + bias) < SCRATCH_LIMITS[dtype]
        older = TritonQuantMatmul(132, fp8=False)
        assert relative_error(older(x, weight, None), ref) < SCRATCH_LIMITS[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_in_scratch_are_the_twins(shape: tuple[str, int, int, int, int, bool]) -> None:
    from weft.kernels.quant_matmul import TritonQuantMatmul

    for dtype in LIMITS:
        weight, _, _ = case(shape, 1, dtype)
        part = TritonQuantMatmul(132).dequantized(weight, 8, 190, dtype)
        assert torch.equal(part, dequantize(weight, dtype)[8:190])


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-block", "awq-32", "gptq", "packed-asym"])
def test_models_on_cuda_equal_models_on_the_cpu(tmp_path: Path, name: str) -> None:
    """float32: a prefill of several rows, then a step of decode rows and a chunk."""
    from weft.kernels.quant_matmul import TritonQuantMatmul
    from weft.models.decoder import Decoder

    path, _ = quant_checkpoint(tmp_path, FORMS[name])
    model = PlainModel(path, dtype="float32")
    weights = packed_weights(path, model.arch).to("cuda")
    decoder = Decoder(model.arch, weights, matmul=TritonQuantMatmul(132))
    kv_bytes = model.page_tokens * model.arch.kv_bytes_per_token * model.num_pages
    kv = decoder.kv_view(torch.zeros(kv_bytes, dtype=torch.uint8, device="cuda"), model.page_tokens)
    rng = np.random.default_rng(0)
    prompts = [[int(t) for t in rng.integers(0, 128, n)] for n in (40, 9, 300)]
    pages = [[int(p) for p in part] for part in np.split(rng.permutation(240), 3)]
    steps = [
        make_batch([(p, 0) for p in prompts], pages),
        make_batch([([5], 40), ([7, 8, 9], 9), ([11], 300)], pages),
    ]
    attention = ReferenceAttention()
    for step in steps:
        expected = model.forward(step)
        there = to_cuda(step)
        attention.plan(there, kv)
        logits = decoder.forward(there, attention, kv).cpu()
        assert float((logits - expected).abs().max()) < 1e-2
        assert relative_error(logits, expected) < 1e-4

"""What the compiler makes of the fused quantized product for an H100 or H200; needs no device.

A hint that gets lost shows nowhere else: the kernel stays right and becomes several times slower.
"""

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, compile  # noqa: E402

from weft.kernels.quant_matmul import _dequantize_kernel, _matmul_kernel, tile_of  # noqa: E402

TENSORS = {
    "x_ptr": "*bf16",
    "w_ptr": "*u8",
    "scale_ptr": "*fp16",
    "zero_ptr": "*u8",
    "bias_ptr": "*bf16",
}


def ptx_of(kernel: Any, constants: dict[str, Any], out: str, warps: int, stages: int) -> str:
    """As launched with aligned tensors; integers but `tokens` and `first` are multiples of 16."""
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, param in enumerate(kernel.params):
        name = param.name
        if name in constants:
            signature[name] = "constexpr"
            values[(i,)] = constants[name]
            continue
        signature[name] = (TENSORS | {"out_ptr": out}).get(name, "i32")
        if name not in ("tokens", "first"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return str(made.asm["ptx"])


@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_weights_are_read_wide_and_ahead(kind: str, input_major: bool) -> None:
    fp8 = kind == "fp8"
    tile = tile_of(8)
    shape = {
        "INPUTS": 4096,
        "GROUP": 4096 if fp8 else 128,
        "FP8": fp8,
        "TILED": True,
        "ALIGNED": True,
        "w_row" if input_major else "w_input": 1,
    }
    sizes = {"BLOCK_T": tile.block_t, "BLOCK_O": tile.block_o, "BLOCK_I": 128}
    rest = {"SPLITS": 2, "HAS_BIAS": False}
    ptx = ptx_of(_matmul_kernel, shape | sizes | rest, "*fp32", tile.warps, tile.stages)
    assert "wgmma.mma_async" in ptx
    widths = {int(w, 0) for w in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?(0x\w+)", ptx)}
    assert widths
    assert min(widths) >= 8
    assert ptx.count("ld.global.b8") < 8, "some for zero points, none for weights"
    assert "cvt.rn.bf16.u" not in ptx, "codes become numbers without a conversion"

    sizes = {"BLOCK_O": 128 if input_major else 32, "BLOCK_I": 32 if fp8 and input_major else 128}
    dense = {"out_row" if input_major else "out_input": 1}
    ptx = ptx_of(_dequantize_kernel, shape | sizes | dense, "*bf16", 4, 3)
    assert "st.global.v4.b32" in ptx
    assert not re.search(r"st\.global\.b\d", ptx)

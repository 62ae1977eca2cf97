"""Run by test_kernels_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import os
from typing import Any

import pytest
import torch

from support.kernel_cases import relative_error

assert os.environ.get("TRITON_INTERPRET") == "1"

from weft.attention.base import ForwardBatch, KvView, store_kv, token_places  # noqa: E402
from weft.kernels import elementwise  # noqa: E402
from weft.kernels.heads import split_heads  # noqa: E402
from weft.kernels.skinny import Scratch, skinny_mm, splits  # noqa: E402
from weft.models.ops import TorchOps  # noqa: E402

OURS, TWIN = elementwise.TritonOps(), TorchOps()
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)


@DTYPES
def test_norms(dtype: torch.dtype) -> None:
    x, residual = torch.randn(3, 72).to(dtype), torch.randn(3, 72).to(dtype)
    weight = torch.randn(72).to(dtype)
    ref, ref_sum = TWIN.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    out, total = OURS.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    assert relative_error(out, ref) < LIMITS[dtype]
    assert torch.equal(total, ref_sum)
    plain = OURS.rms_norm(residual, weight, 1e-6)
    assert relative_error(plain, TWIN.rms_norm(residual, weight, 1e-6)) < LIMITS[dtype]


@DTYPES
def test_norms_with_an_offset(dtype: torch.dtype) -> None:
    x, residual = torch.randn(3, 72).to(dtype), torch.randn(3, 72).to(dtype)
    weight = (0.1 * torch.randn(72)).to(dtype)
    ref, ref_sum = TWIN.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6, 1.0)
    out, total = OURS.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6, 1.0)
    assert relative_error(out, ref) < LIMITS[dtype]
    assert torch.equal(total, ref_sum)


@DTYPES
@pytest.mark.parametrize("half", [1, 3, 8])
def test_rotary_of_a_part_of_each_head(dtype: torch.dtype, half: int) -> None:
    heads = torch.randn(3, 2, 5, 20).to(dtype)
    angle = torch.randn(3, half)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    ref = TWIN.rotary(heads.flatten(1, 2), cos, sin).view_as(heads)
    assert torch.equal(ref[..., 2 * half :], heads[..., 2 * half :])
    q, k = elementwise.split_rotary(heads, cos, sin, group=3)
    assert relative_error(q, ref[:, :, :3].flatten(1, 2)) < LIMITS[dtype]
    assert relative_error(k, ref[:, :, 3]) < LIMITS[dtype]


@DTYPES
def test_rotary(dtype: torch.dtype) -> None:
    tokens, kv_heads, group, head_dim = 3, 2, 3, 20
    heads = torch.randn(tokens, kv_heads, group + 2, head_dim).to(dtype)
    angle = torch.randn(tokens, head_dim // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    ref = TWIN.rotary(heads.flatten(1, 2), cos, sin).view_as(heads)
    q, k = elementwise.split_rotary(heads, cos, sin, group=group)
    assert relative_error(q, ref[:, :, :group].flatten(1, 2)) < LIMITS[dtype]
    assert relative_error(k, ref[:, :, group]) < LIMITS[dtype]
    plain = OURS.rotary(heads.flatten(1, 2), cos, sin)
    assert relative_error(plain, ref.flatten(1, 2)) < LIMITS[dtype]


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations(dtype: torch.dtype, activation: Any) -> None:
    x = 3 * torch.randn(3, 4, 2, 600).to(dtype)
    ours, twin = OURS.act_mul(x, activation), TWIN.act_mul(x, activation)
    assert relative_error(ours, twin) < LIMITS[dtype]


def test_store_writes_these_places_only() -> None:
    layers, page_tokens, heads, head_dim = 3, 4, 2, 6
    pages = torch.full((7, layers, 2, page_tokens, heads, head_dim), -7.0)
    table = torch.tensor([[6, 1, 9], [0, 3, 9], [4, 5, 2]], dtype=torch.int32)
    starts, counts, slots = (2, 7), (5, 1), torch.tensor([2, 1])
    rows = torch.tensor([0] * 5 + [1])
    positions = torch.tensor([2, 3, 4, 5, 6, 7])
    batch = ForwardBatch(
        token_ids=positions,
        positions=positions,
        token_rows=rows,
        row_offsets=torch.tensor([0, 5, 6], dtype=torch.int32),
        row_starts=torch.tensor(starts, dtype=torch.int32),
        row_tokens=torch.tensor(counts, dtype=torch.int32),
        slots=slots,
        page_table=table,
        sample_tokens=torch.tensor([5]),
        starts=starts,
        num_tokens=counts,
    )
    fused = torch.randn(6, heads, 3, head_dim)
    k, v = fused[:, :, 1], fused[:, :, 2]
    expected = pages.clone()
    store_kv(token_places(batch, page_tokens), 1, k, v, KvView(expected))
    elementwise.store_kv(k, v, pages[:, 1], positions, rows, slots, table)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
@pytest.mark.parametrize("rotary_dim", [12, 8])
@DTYPES
def test_heads_in_one_kernel_are_the_parts(
    dtype: torch.dtype, rotary_dim: int, offset: float | None
) -> None:
    layers, page_tokens, kv_heads, group, head_dim = 2, 4, 2, 3, 12
    pages = torch.full((7, layers, 2, page_tokens, kv_heads, head_dim), -7.0, dtype=dtype)
    table = torch.tensor([[6, 1, 9], [0, 3, 9], [4, 5, 2]], dtype=torch.int32)
    slots, rows = torch.tensor([2, 1, 0]), torch.tensor([0, 0, 1, 2])
    positions = torch.tensor([3, 4, 7, -1])  # the last row only fills the batch
    heads = torch.randn(4, kv_heads, group + 2, head_dim).to(dtype)
    angle = torch.randn(8, rotary_dim // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    norms = None
    keyed = heads[:, :, : group + 1]
    if offset is not None:
        norms = torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)
        parts = keyed[:, :, :group], keyed[:, :, group:]
        keyed = torch.cat(
            [
                TWIN.rms_norm(x.reshape(-1, head_dim), w, 1e-6, offset).view(x.shape)
                for x, w in zip(parts, norms, strict=True)
            ],
            dim=2,
        )
    ref = TWIN.rotary(keyed.flatten(1, 2), cos[positions], sin[positions]).view_as(keyed)
    expected = pages.clone()
    for token, (page, at) in enumerate([(4, 3), (5, 0), (3, 3)]):
        expected[page, 1, 0, at] = ref[token, :, group]
        expected[page, 1, 1, at] = heads[token, :, group + 1]
    q = split_heads(
        heads,
        cos,
        sin,
        pages[:, 1],
        positions,
        rows,
        slots,
        table,
        norms=norms,
        eps=1e-6,
        norm_offset=offset or 0.0,
    )
    assert relative_error(q[:3], ref[:3, :, :group].flatten(1, 2)) < LIMITS[dtype]
    untouched = torch.ones(7, dtype=torch.bool)
    untouched[[4, 5, 3]] = False
    assert torch.equal(pages[untouched], expected[untouched])
    assert torch.equal(pages == -7.0, expected == -7.0)
    assert relative_error(pages, expected) < LIMITS[dtype]
    assert torch.equal(pages[:, 1, 1], expected[:, 1, 1])


@pytest.mark.parametrize("rows", [1, 5, 17, 32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(700, 130), (96, 64)])
def test_products_of_few_rows(rows: int, transposed: bool, inputs: int, outputs: int) -> None:
    assert (splits(inputs, outputs)[0] > 1) == (inputs == 700), "one case is cut, one is not"
    x = torch.randn(rows, inputs).half()
    weight = torch.randn(outputs, inputs).half() / inputs**0.5
    weight_IO = weight.t().contiguous() if transposed else weight.t()
    bias = torch.randn(outputs).half()
    scratch = Scratch.make(x.device)
    scratch.parts.fill_(float("nan"))
    for bias_O in (None, bias):  # twice: the counts are zero again
        out = torch.full((rows, outputs + 6), -7.0).half()
        got = skinny_mm(x, weight_IO, bias_O, scratch, out[:, :outputs])
        ref = x.float() @ weight_IO.float() + (0 if bias_O is None else bias_O.float())
        assert relative_error(got, ref) < 1e-3
        assert (out[:, outputs:] == -7.0).all()
        assert not scratch.counts.any()

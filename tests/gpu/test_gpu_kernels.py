"""The Triton kernels on the device, against float32 torch on the same inputs."""

import pytest
import torch

from support.gpu import needs_gpu
from support.kernel_cases import AttentionCase, attention_case, relative_error
from weft.core.actions import Row
from weft.core.ids import RequestId, SlotId
from weft.core.request import Sampling
from weft.engine.sampler import SamplingBatch, sample
from weft.kernels.word_sum import word_sum
from weft.models.ops import TorchOps

pytestmark = needs_gpu

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [
    # q heads, kv heads, head dim, page tokens, dtype
    (28, 4, 128, 32, torch.bfloat16),
    (8, 8, 64, 16, torch.float16),
    (8, 2, 80, 128, torch.bfloat16),
    (6, 1, 24, 16, torch.float32),
    (4, 2, 256, 16, torch.bfloat16),
]


HOW = pytest.mark.parametrize(
    ("window", "cap"), [(0, None), (1, None), (100, 2.0), (512, None), (4096, 30.0), (0, 2.0)]
)


def case_of(
    shape: tuple[int, int, int, int, torch.dtype],
    starts: list[int],
    counts: list[int],
    window: int = 0,
    cap: float | None = None,
) -> AttentionCase:
    q_heads, kv_heads, head_dim, page_tokens, dtype = shape
    return attention_case(
        seed=3,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        starts=starts,
        counts=counts,
        dtype=dtype,
        device="cuda",
        window=window,
        cap=cap,
    )


def check(case: AttentionCase, out: torch.Tensor, lse: torch.Tensor) -> None:
    ref, ref_lse = attention_ref(case)
    assert relative_error(out, ref) < LIMITS[case.q.dtype]
    torch.testing.assert_close(lse, ref_lse.float(), rtol=5e-3, atol=5e-3)


def attention_ref(case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor]:
    from weft.kernels.paged_attention import attention_torch

    return attention_torch(
        case.q, case.kv, case.table, case.slots, case.starts, case.counts, **case.how
    )


def decode(case: AttentionCase, splits: int, lse: torch.Tensor | None = None) -> torch.Tensor:
    from weft.kernels.paged_attention import decode_attention

    out = torch.full_like(case.q, float("nan"))
    decode_attention(
        case.q,
        case.kv,
        case.table,
        case.int32(case.slots),
        case.int32(case.starts),
        case.int32(case.row_tokens()),
        out,
        **case.how,
        splits=splits,
        lse=lse,
    )
    return out


@HOW
@pytest.mark.parametrize("splits", [1, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(
    shape: tuple[int, int, int, int, torch.dtype], splits: int, window: int, cap: float | None
) -> None:
    starts = [0, 15, 16, 63, 64, 700, 2047]
    case = case_of(shape, starts, [1] * len(starts), window, cap)
    lse = torch.full(case.q.shape[:2], float("nan"), device="cuda")
    out = decode(case, splits, lse)
    check(case, out, lse)
    assert torch.equal(decode(case, splits), out), "the same launch gives the same bits"


@HOW
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks(
    shape: tuple[int, int, int, int, torch.dtype], window: int, cap: float | None
) -> None:
    from weft.kernels.paged_attention import (
        ChunkBlocks,
        chunk_attention,
        chunk_block_tokens,
        cut_chunks,
    )

    case = case_of(shape, [0, 31, 500, 3, 64], [300, 1, 129, 2, 64], window, cap)
    lse = torch.full(case.q.shape[:2], float("nan"), device="cuda")
    out = torch.full_like(case.q, float("nan"))
    group = case.q.shape[1] // case.kv.shape[3]
    tokens = chunk_block_tokens(group, case.q.shape[2], case.q.element_size())
    rows = list(zip(case.slots, case.starts, case.row_tokens(), case.counts, strict=True))
    blocks = ChunkBlocks(*(case.int32(column) for column in cut_chunks(rows, tokens)))
    chunk_attention(case.q, case.kv, case.table, blocks, out, **case.how, lse=lse)
    check(case, out, lse)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_elementwise(dtype: torch.dtype) -> None:
    from weft.kernels.elementwise import TritonOps

    ours, twin = TritonOps(), TorchOps()
    gen = torch.Generator(device="cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen, device="cuda").to(dtype)

    x, residual, weight = draw(37, 3584), draw(37, 3584), draw(3584)
    ref, ref_sum = twin.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    out, total = ours.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    assert torch.equal(total, ref_sum)
    assert relative_error(out, ref) < LIMITS[dtype]
    heads, angle = draw(37, 12, 128), draw(37, 64)
    cos, sin = angle.float().cos().to(dtype), angle.float().sin().to(dtype)
    assert (
        relative_error(ours.rotary(heads, cos, sin), twin.rotary(heads, cos, sin)) < LIMITS[dtype]
    )
    part = (heads, cos[:, :24], sin[:, :24])
    assert relative_error(ours.rotary(*part), twin.rotary(*part)) < LIMITS[dtype]
    gate_up = 3 * draw(37, 8, 2, 2368)
    for activation in ("silu", "gelu_tanh"):
        out, ref = ours.act_mul(gate_up, activation), twin.act_mul(gate_up, activation)
        assert relative_error(out, ref) < LIMITS[dtype]
    ref = twin.rms_norm(x, weight, 1e-6, 1.0)
    assert relative_error(ours.rms_norm(x, weight, 1e-6, 1.0), ref) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_draws(dtype: torch.dtype) -> None:
    from weft.kernels.sampling import draw

    rows = [
        Row(
            request=RequestId(i),
            slot=SlotId(i),
            start=0,
            num_tokens=1,
            input=None,
            sample=Sampling(temperature=(0.0, 0.6, 1.0, 2.0)[i % 4], seed=i - 9),
            output_index=i * i,
        )
        for i in range(256)
    ]
    gen = torch.Generator(device="cuda").manual_seed(1)
    wide = 3 * torch.randn(256, 152064 + 8, generator=gen, device="cuda")
    logits = wide.to(dtype)[:, :152064]
    batch = SamplingBatch.from_rows(rows, "cuda")
    drawn = draw(logits, batch.temperature, batch.seed, batch.output_index)
    differ = drawn != sample(logits, batch)
    assert int(differ.sum()) <= 1, "but for the last place of a logarithm"
    assert not differ[::4].any(), "greedy rows are exact"
    again = draw(logits[7:8], batch.temperature[7:8], batch.seed[7:8], batch.output_index[7:8])
    assert torch.equal(again, drawn[7:8])


def test_checksums() -> None:
    from weft.kernels.checksum import device_sums

    memory = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, device="cuda")
    offsets, size = [0, 4096, 999 * 8], 262144 + 8
    sums = device_sums(memory, offsets, size).tolist()
    assert sums == [word_sum(memory[at : at + size].cpu()) for at in offsets]
    memory[4096 + 17] ^= 4
    changed = device_sums(memory, offsets, size).tolist()
    assert changed[1] != sums[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("inputs", "outputs", "transposed"),
    [(3584, 4608, False), (3584, 3584, True), (18944, 3584, True), (1024, 152064, False)],
)
def test_products_of_few_rows(
    dtype: torch.dtype, inputs: int, outputs: int, transposed: bool
) -> None:
    """Against float32, and the same bits every time, whichever program comes last."""
    from weft.kernels.skinny import Scratch, skinny_mm

    scratch = Scratch.make(torch.device("cuda"))
    scratch.parts.fill_(float("nan"))
    weight = torch.randn(outputs, inputs, device="cuda", dtype=dtype) / inputs**0.5
    weight_IO = weight.t().contiguous() if transposed else weight.t()
    bias = torch.randn(outputs, device="cuda", dtype=dtype)
    for rows in (1, 7, 32):
        x = torch.randn(rows, inputs, device="cuda", dtype=dtype)
        ref = x.float() @ weight_IO.float() + bias.float()
        first = skinny_mm(x, weight_IO, bias, scratch)
        assert relative_error(first, ref) < (1e-2 if dtype == torch.bfloat16 else 2e-3)
        for _ in range(20):
            assert torch.equal(skinny_mm(x, weight_IO, bias, scratch), first)
    assert not scratch.counts.any()

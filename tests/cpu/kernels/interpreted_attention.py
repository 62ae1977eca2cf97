"""Run by test_kernels_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from support.kernel_cases import AttentionCase, attention_case, relative_error

assert os.environ.get("TRITON_INTERPRET") == "1"

from weft.kernels import paged_attention_jit  # noqa: E402
from weft.kernels.paged_attention import (  # noqa: E402
    ChunkBlocks,
    attention_torch,
    chunk_attention,
    chunk_block_tokens,
    cut_chunks,
    decode_attention,
)

LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def run_decode(case: AttentionCase, splits: int, lse: torch.Tensor | None) -> torch.Tensor:
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


def run_chunks(case: AttentionCase, lse: torch.Tensor | None) -> torch.Tensor:
    out = torch.full_like(case.q, float("nan"))
    tokens = chunk_block_tokens(
        case.q.shape[1] // case.kv.shape[3], case.q.shape[2], case.q.element_size()
    )
    rows = zip(case.slots, case.starts, case.row_tokens(), case.counts, strict=True)
    blocks = ChunkBlocks(*(case.int32(column) for column in cut_chunks(list(rows), tokens)))
    chunk_attention(case.q, case.kv, case.table, blocks, out, **case.how, lse=lse)
    return out


def check(case: AttentionCase, out: torch.Tensor, lse: torch.Tensor) -> None:
    ref, ref_lse = attention_torch(
        case.q, case.kv, case.table, case.slots, case.starts, case.counts, **case.how
    )
    assert relative_error(out, ref) < LIMITS[case.q.dtype]
    torch.testing.assert_close(lse, ref_lse.float(), rtol=2e-3, atol=2e-3)


SHAPES = [
    # q heads, kv heads, head dim, page tokens, dtype
    (7, 1, 128, 32, torch.float32),
    (4, 4, 64, 16, torch.float32),
    (8, 2, 80, 16, torch.float16),
    (6, 2, 16, 128, torch.float16),
    # bfloat16: the interpreter multiplies the bit patterns; tests/gpu has it.
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(shape: tuple[int, int, int, int, torch.dtype], splits: int) -> None:
    q_heads, kv_heads, head_dim, page_tokens, dtype = shape
    starts = [0, 15, 16, 130, 201]
    case = attention_case(
        seed=splits,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        starts=starts,
        counts=[1] * len(starts),
        dtype=dtype,
    )
    lse = torch.full(case.q.shape[:2], float("nan"))
    check(case, run_decode(case, splits, lse), lse)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks(shape: tuple[int, int, int, int, torch.dtype]) -> None:
    q_heads, kv_heads, head_dim, page_tokens, dtype = shape
    case = attention_case(
        seed=5,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        starts=[0, 31, 100, 3],
        counts=[45, 1, 20, 2],
        dtype=dtype,
    )
    lse = torch.full(case.q.shape[:2], float("nan"))
    check(case, run_chunks(case, lse), lse)


HOW = pytest.mark.parametrize(("window", "cap"), [(1, None), (16, 2.0), (37, 2.0), (1000, 5.0)])


@HOW
def test_decode_with_windows_and_caps(window: int, cap: float | None) -> None:
    """Pages outside a window are not even in the table."""
    splits = 3 if window == 37 else 1
    starts = [0, 16, 37, 63, 201]
    case = attention_case(
        seed=splits,
        q_heads=3,
        kv_heads=1,
        head_dim=24,
        page_tokens=16,
        starts=starts,
        counts=[1] * len(starts),
        dtype=torch.float32,
        window=window,
        cap=cap,
    )
    lse = torch.full(case.q.shape[:2], float("nan"))
    check(case, run_decode(case, splits, lse), lse)


@HOW
def test_chunks_with_windows_and_caps(window: int, cap: float | None) -> None:
    case = attention_case(
        seed=5,
        q_heads=3,
        kv_heads=1,
        head_dim=24,
        page_tokens=16,
        starts=[0, 31, 100, 3],
        counts=[70, 1, 20, 2],
        dtype=torch.float32,
        window=window,
        cap=cap,
    )
    lse = torch.full(case.q.shape[:2], float("nan"))
    check(case, run_chunks(case, lse), lse)


@pytest.mark.parametrize("count", [1, 20])
def test_tiles_outside_a_window_are_not_visited(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """32 keys a tile: the window of 40 and the tokens of the step lie in four at most."""
    tiles: list[int] = []
    plain = paged_attention_jit._key_tile

    def counting(*args: Any, **options: Any) -> Any:
        tiles.append(1)
        return plain(*args, **options)

    monkeypatch.setattr(paged_attention_jit, "_key_tile", counting)
    for window in (40, 0):
        tiles.clear()
        case = attention_case(
            seed=2,
            q_heads=1,
            kv_heads=1,
            head_dim=16,
            page_tokens=16,
            starts=[500],
            counts=[count],
            dtype=torch.float32,
            window=window,
        )
        lse = torch.full(case.q.shape[:2], float("nan"))
        run = run_chunks(case, lse) if count > 1 else run_decode(case, 1, lse)
        check(case, run, lse)
        assert 0 < len(tiles) <= 4 if window else len(tiles) >= 16


def test_a_row_does_not_depend_on_pages_or_company() -> None:
    kwargs = dict(q_heads=4, kv_heads=2, head_dim=32, page_tokens=16, dtype=torch.float32)
    case = attention_case(seed=1, starts=[70, 40, 90], counts=[1, 1, 1], **kwargs)
    first = run_decode(case, 2, None)
    order = torch.randperm(case.kv.shape[0])
    where = torch.argsort(order).int()
    owned = case.table < 2**30
    moved = replace(
        case,
        kv=case.kv[order].clone(),
        table=torch.where(owned, where[case.table.long() * owned], case.table),
    )
    assert torch.equal(run_decode(moved, 2, None), first)
    company = torch.cat([case.q[:1], torch.randn_like(case.q[1:])])
    other = replace(case, q=company, starts=[70, 3, 12])
    assert torch.equal(run_decode(other, 2, None)[0], first[0])

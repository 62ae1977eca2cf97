"""The reference backend against dense attention, and what its result may not depend on."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support.plain import make_batch
from weft.attention.base import PLAIN_ATTENTION, AttentionParams, KvView
from weft.attention.reference import ReferenceAttention, bucket_pages


@dataclass
class Case:
    """Rows of random K, V and queries. `context` r is start + num_tokens of row r."""

    starts: list[int]
    counts: list[int]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    q: list[torch.Tensor]


def random_case(
    spans: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    seed: int,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Case(
        [start for start, _ in spans],
        [count for _, count in spans],
        [normal(start + count, kv_heads, dim) for start, count in spans],
        [normal(start + count, kv_heads, dim) for start, count in spans],
        [normal(count, heads, dim) for _, count in spans],
    )


def run(
    case: Case,
    rows: list[int],
    *,
    page_tokens: int = 8,
    page_seed: int = 0,
    layers: int = 2,
    params: AttentionParams = PLAIN_ATTENTION,
) -> list[torch.Tensor]:
    """Outputs of the chosen rows, computed in one step on a pool full of NaN."""
    kv_heads, dim = case.k[0].shape[1:]
    needed = sum(-(-len(case.k[r]) // page_tokens) for r in rows)
    pool = torch.full(
        (needed + 7, layers, 2, page_tokens, kv_heads, dim), float("nan"), dtype=case.q[0].dtype
    )
    free = [int(p) for p in np.random.default_rng(page_seed).permutation(needed + 7)]
    kv, layer = KvView(pool), layers - 1
    pages = [[free.pop() for _ in range(-(-len(case.k[r]) // page_tokens))] for r in rows]
    for r, own in zip(rows, pages, strict=True):
        for position in range(case.starts[r]):
            page, offset = own[position // page_tokens], position % page_tokens
            pool[page, layer, 0, offset] = case.k[r][position]
            pool[page, layer, 1, offset] = case.v[r][position]
    batch = make_batch([([0] * case.counts[r], case.starts[r]) for r in rows], pages)
    backend = ReferenceAttention()
    backend.plan(batch, kv)
    out = backend.run(
        layer,
        torch.cat([case.q[r] for r in rows]),
        torch.cat([case.k[r][case.starts[r] :] for r in rows]),
        torch.cat([case.v[r][case.starts[r] :] for r in rows]),
        kv,
        params,
    )
    assert out.is_contiguous()
    assert bool(pool[:, :layer].isnan().all()), "another layer was written"
    return list(out.split([case.counts[r] for r in rows]))


def dense(case: Case, r: int) -> torch.Tensor:
    """torch's own attention over the row's K and V, in float64."""
    q, k, v = (x[r].double().transpose(0, 1) for x in (case.q, case.k, case.v))
    group = q.shape[0] // k.shape[0]
    seen = (
        torch.arange(len(case.k[r]))[None]
        <= (case.starts[r] + torch.arange(case.counts[r]))[:, None]
    )
    out = F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0), attn_mask=seen
    )
    return out.transpose(0, 1)


def dense_by_hand(case: Case, r: int, params: AttentionParams) -> torch.Tensor:
    """One query at a time over the keys it sees, in float64."""
    q, k, v = (x[r].double() for x in (case.q, case.k, case.v))
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for t in range(len(q)):
        end = case.starts[r] + t + 1
        begin = max(0, end - params.window) if params.window else 0
        for head in range(q.shape[1]):
            scores = k[begin:end, head // group] @ q[t, head] * params.scale
            if params.cap is not None:
                scores = params.cap * torch.tanh(scores / params.cap)
            out[t, head] = torch.softmax(scores, 0) @ v[begin:end, head // group]
    return out


SPANS = [(0, 1), (0, 9), (63, 1), (64, 1), (17, 30), (200, 1), (100, 1), (7, 1), (600, 1), (31, 1)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 20), (7, 1, 8)])
@pytest.mark.parametrize("page_tokens", [1, 8, 128])
def test_equals_dense_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, page_tokens: int
) -> None:
    case = random_case(SPANS, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, seed=1)
    for r, out in enumerate(run(case, list(range(len(SPANS))), page_tokens=page_tokens)):
        assert out.dtype == dtype
        error = float((out.double() - dense(case, r)).abs().max())
        assert error < TOLERANCE[dtype], f"row {r}: {error}"


@pytest.mark.parametrize("window", [0, 1, 9, 64, 1000])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_windows_caps_and_scales(window: int, cap: float | None) -> None:
    params = AttentionParams(scale=0.8, window=window, cap=cap)
    spans = [(0, 1), (0, 20), (63, 1), (17, 30), (130, 1)]
    case = random_case(spans, heads=4, kv_heads=2, dim=8, dtype=torch.float64, seed=1)
    for r, out in enumerate(run(case, list(range(len(spans))), params=params)):
        error = float((out - dense_by_hand(case, r, params)).abs().max())
        assert error < 1e-12, f"row {r}: {error}"
        assert torch.equal(run(case, [r], params=params)[0], out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (6, 2, 20), (8, 8, 64)])
def test_a_row_depends_neither_on_its_company_nor_on_page_ids(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    """To the bit, over random subsets of rows in random order."""
    rng = np.random.default_rng(5)
    spans = [(int(s), 1) for s in rng.integers(0, 300, 20)]
    spans += [(int(s), 5) for s in rng.integers(0, 60, 6)] + [(0, 40), (12, 33)]
    case = random_case(spans, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, seed=2)
    alone = [run(case, [r])[0] for r in range(len(spans))]
    for trial in range(12):
        rows = [int(r) for r in rng.permutation(len(spans))[: int(rng.integers(1, len(spans)))]]
        for r, out in zip(rows, run(case, rows, page_seed=trial), strict=True):
            assert torch.equal(out, alone[r]), f"row {r} among {rows}"


def test_writes_new_keys_and_values_to_their_places() -> None:
    case = random_case([(5, 6)], heads=2, kv_heads=1, dim=4, dtype=torch.float32, seed=3)
    pool = torch.zeros(4, 1, 2, 4, 1, 4)
    batch = make_batch([([0] * 6, 5)], [[3, 0, 2]])
    backend = ReferenceAttention()
    backend.plan(batch, KvView(pool))
    backend.run(0, case.q[0], case.k[0][5:], case.v[0][5:], KvView(pool))
    for kind, values in enumerate((case.k[0], case.v[0])):
        flat = pool[[3, 0, 2], 0, kind].flatten(0, 1)
        assert torch.equal(flat[5:11], values[5:])
        assert not flat[:5].any()
        assert not flat[11:].any()
    assert not pool[1].any()


def test_running_a_step_again_changes_nothing() -> None:
    """The law of idempotence: a step may be run again until its end is reported."""
    case = random_case([(0, 30)], heads=4, kv_heads=2, dim=8, dtype=torch.float32, seed=4)
    pool = torch.full((5, 1, 2, 8, 2, 8), float("nan"))
    batch = make_batch([([0] * 30, 0)], [[4, 1, 0, 3]])
    backend = ReferenceAttention()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(2):
        backend.plan(batch, KvView(pool))
        out = backend.run(0, case.q[0], case.k[0], case.v[0], KvView(pool))
        seen.append((out, pool.nan_to_num(7.0)))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize(
    ("context", "page_tokens", "pages"),
    [
        (1, 16, 4),
        (64, 16, 4),
        (65, 16, 8),
        (500, 16, 32),
        (513, 16, 64),
        (1025, 16, 96),
        (1, 128, 1),
    ],
)
def test_buckets(context: int, page_tokens: int, pages: int) -> None:
    assert bucket_pages(context, page_tokens) == pages

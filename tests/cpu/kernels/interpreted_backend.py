"""Run by test_kernels_interpreter.py in a process of its own with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from support.kernel_cases import relative_error

assert os.environ.get("TRITON_INTERPRET") == "1"

from weft.attention.base import AttentionParams, ForwardBatch, KvView  # noqa: E402
from weft.attention.triton import TritonAttention  # noqa: E402
from weft.kernels.paged_attention import attention_torch  # noqa: E402

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, LAYERS = 6, 2, 16, 16, 2


def step(
    slots: list[int], starts: list[int], counts: list[int], table: torch.Tensor
) -> ForwardBatch:
    offsets = [sum(counts[:i]) for i in range(len(counts) + 1)]
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    positions = [
        start + i for start, count in zip(starts, counts, strict=True) for i in range(count)
    ]
    return ForwardBatch(
        token_ids=torch.tensor(positions),
        positions=torch.tensor(positions),
        token_rows=torch.tensor(rows),
        row_offsets=torch.tensor(offsets, dtype=torch.int32),
        row_starts=torch.tensor(starts, dtype=torch.int32),
        row_tokens=torch.tensor(counts, dtype=torch.int32),
        slots=torch.tensor(slots),
        page_table=table,
        sample_tokens=torch.tensor([offsets[-1] - 1]),
        starts=tuple(starts),
        num_tokens=tuple(counts),
    )


@pytest.mark.parametrize("splits", [None, 1, 2])
@pytest.mark.parametrize(
    ("starts", "counts"),
    [([0, 0], [20, 3]), ([20, 3], [1, 1]), ([20, 3, 0], [1, 40, 7]), ([5, 90, 0], [1, 1, 30])],
)
def test_backend_equals_the_twin(starts: list[int], counts: list[int], splits: int | None) -> None:
    rows = len(starts)
    pages = torch.randn(24, LAYERS, 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM)
    table = torch.randperm(24)[: 8 * rows].view(rows, 8).int()
    slots = list(reversed(range(rows)))
    batch = step(slots, starts, counts, table)
    backend = TritonAttention(splits=splits)
    kv = KvView(pages)
    backend.plan(batch, kv)
    params = [AttentionParams(), AttentionParams(scale=0.7, window=9, cap=3.0)]
    for layer in range(LAYERS):
        q, k, v = (torch.randn(sum(counts), n, HEAD_DIM) for n in (Q_HEADS, KV_HEADS, KV_HEADS))
        out = backend.run(layer, q, k, v, kv, params[layer])
        how = {"scale": 0.7, "window": 9, "cap": 3.0} if layer else {"scale": HEAD_DIM**-0.5}
        ref, _ = attention_torch(q, pages[:, layer], table, slots, starts, counts, **how)
        assert relative_error(out, ref) < 2e-6
        # The twin reads the pool, so what was stored is compared with k and v themselves.
        last = starts[-1] + counts[-1] - 1
        place = int(table[slots[-1], last // PAGE_TOKENS]), last % PAGE_TOKENS
        assert torch.equal(pages[place[0], layer, 0, place[1]], k[-1])
        assert torch.equal(pages[place[0], layer, 1, place[1]], v[-1])


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_that_fill_a_batch_are_zeros_and_touch_nothing(splits: int) -> None:
    pages = torch.randn(24, LAYERS, 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM)
    before = pages.clone()
    table = torch.randperm(24)[:16].view(2, 8).int()
    table[1] = 1 << 30  # whoever reads it leaves the pool
    batch = step([0, 1], [20, -1], [1, 1], table)
    backend = TritonAttention(splits=splits)
    backend.plan(batch, KvView(pages))
    group = Q_HEADS // KV_HEADS
    heads = torch.randn(2, KV_HEADS, group + 2, HEAD_DIM)
    flat = torch.ones(32, HEAD_DIM // 2), torch.zeros(32, HEAD_DIM // 2)
    out = backend.run_heads(1, heads, flat, None, KvView(pages))
    place = int(table[0, 20 // PAGE_TOKENS]), 20 % PAGE_TOKENS
    assert torch.equal(pages[place[0], 1, 0, place[1]], heads[0, :, group])
    q = heads[:1, :, :group].reshape(1, Q_HEADS, HEAD_DIM)
    ref, _ = attention_torch(q, pages[:, 1], table, [0], [20], [1], scale=HEAD_DIM**-0.5)
    assert relative_error(out[:1], ref) < 1e-6
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    pages[place[0], 1, :, place[1]] = before[place[0], 1, :, place[1]]
    assert torch.equal(pages, before)

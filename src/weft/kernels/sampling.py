"""Drawing tokens without truncation, in two passes over the logits and no scratch of their size.

The same draw as `engine.sampler.sample` (its torch twin): the noise's bits are equal, logarithms
and the division may differ in the last place.

Shape legend: S sampling rows, V vocabulary, B blocks of the vocabulary.
"""

import torch
import triton
import triton.language as tl

BLOCK_V = 4096


@triton.jit
def _mix(x):
    """splitmix64's finaliser, on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _log1p(x):
    """log(1 + x) to the last places for small x (Kahan's correction of the rounded sum)."""
    w = 1.0 + x
    far = tl.where(w == 1.0, 1.0, w - 1.0)
    return tl.where(w == 1.0, x, tl.log(w) * (x / far))


@triton.jit
def _max_kernel(x_ptr, max_ptr, x_stride, vocab, blocks, BLOCK: tl.constexpr):
    """Grid (S, B): the largest logit of each block; NaN counts as -inf."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    tl.store(max_ptr + row * blocks + block, tl.max(x, 0))


@triton.jit
def _score_kernel(
    x_ptr,
    max_ptr,
    temperature_ptr,
    seed_ptr,
    index_ptr,
    score_ptr,
    id_ptr,
    x_stride,
    vocab,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid (S, B): the best score of each block and the lowest id that has it."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    each = tl.arange(0, BLOCKS)
    top = tl.load(max_ptr + row * blocks + each, mask=each < blocks, other=float("-inf"))
    largest = tl.max(top, 0)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    score = x - largest
    score = tl.where(score == score, score, 0.0)
    if temperature != 0.0:
        golden = 0x9E3779B97F4A7C15
        seed = tl.load(seed_ptr + row).to(tl.uint64)
        index = tl.load(index_ptr + row).to(tl.uint64)
        key = _mix(seed * 0x94D049BB133111EB + (index + 1) * golden)
        bits = _mix(key + (at + 1).to(tl.uint64) * golden)
        uniform = ((bits >> 32) * 2 + 1).to(tl.float32) * (1.0 / 8589934592.0)
        uniform = tl.minimum(uniform, 1.0 - 1.0 / 16777216.0)
        score = score / temperature - tl.log(-_log1p(-uniform))
    score = tl.where(inside, score, float("-inf"))
    best = tl.max(score, 0)
    # Past the vocabulary nothing may win, even where all scores are -inf.
    ids = tl.where((score == best) & inside, at, vocab)
    tl.store(score_ptr + row * blocks + block, best)
    tl.store(id_ptr + row * blocks + block, tl.min(ids, 0))


@triton.jit
def _pick_kernel(score_ptr, id_ptr, out_ptr, vocab, blocks, BLOCKS: tl.constexpr):
    """Grid (S,): the lowest id of the best score of all blocks."""
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, BLOCKS)
    inside = each < blocks
    score = tl.load(score_ptr + row * blocks + each, mask=inside, other=float("-inf"))
    ids = tl.load(id_ptr + row * blocks + each, mask=inside, other=0)
    best = tl.max(score, 0)
    tl.store(out_ptr + row, tl.min(tl.where((score == best) & inside, ids, vocab), 0).to(tl.int64))


def draw(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    index_S: torch.Tensor,
) -> torch.Tensor:
    """int64 [S]: what each row draws (temperature 0: the lowest id of the largest logit).

    logits: float32, float16 or bfloat16 with unit stride in V; the others as in
    `engine.sampler.SamplingBatch`.
    """
    rows, vocab = logits_SV.shape
    device = logits_SV.device
    blocks = triton.cdiv(vocab, BLOCK_V)
    width = triton.next_power_of_2(blocks)
    largest = torch.empty((rows, blocks), dtype=torch.float32, device=device)
    score = torch.empty((rows, blocks), dtype=torch.float32, device=device)
    ids = torch.empty((rows, blocks), dtype=torch.int32, device=device)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    grid, stride = (rows, blocks), logits_SV.stride(0)
    _max_kernel[grid](logits_SV, largest, stride, vocab, blocks, BLOCK=BLOCK_V, num_warps=8)
    _score_kernel[grid](
        logits_SV,
        largest,
        temperature_S,
        seed_S,
        index_S,
        score,
        ids,
        stride,
        vocab,
        blocks,
        BLOCK=BLOCK_V,
        BLOCKS=width,
        num_warps=8,
    )
    _pick_kernel[(rows,)](score, ids, out, vocab, blocks, BLOCKS=width, num_warps=1)
    return out

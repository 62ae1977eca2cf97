"""Drawing tokens: greedy and random, truncated and masked, alone and in company."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from weft.core.actions import Row
from weft.core.ids import RequestId, SlotId
from weft.core.request import Sampling
from weft.engine.sampler import SamplingBatch, gumbel_noise, noise_bits, sample

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def row(sampling: Sampling | None = None, **change: Any) -> Row:
    facts: dict[str, Any] = {"start": 0, "num_tokens": 1, "input": None}
    return Row(
        request=RequestId(0), slot=SlotId(0), sample=sampling or Sampling(), **(facts | change)
    )


def draw(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    return [int(t) for t in sample(logits, SamplingBatch.from_rows(rows))]


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 1000, dtype=dtype)
    logits[1, [700, 300, 999]] = 2
    logits[2] = float("-inf")
    logits[3, 500:] = float("inf")
    assert draw(logits, [row()] * 4) == [0, 300, 0, 500]


def test_nan_logits_never_win() -> None:
    logits = torch.tensor([[float("nan"), 1.0, 2.0, float("nan")]])
    assert draw(logits, [row()]) == [2]
    assert draw(logits, [row(Sampling(temperature=1e-6))]) == [2]
    assert draw(torch.full((1, 4), float("nan")), [row()]) == [0]


def test_a_view_into_padded_logits_never_yields_the_padding() -> None:
    wide = torch.zeros(3, 16)
    wide[:, 13:] = 100.0
    rows = [row(), row(Sampling(temperature=1.0, seed=1)), row(Sampling(temperature=2.0, top_k=9))]
    for index in range(50):
        rows = [row(r.sample, output_index=index) for r in rows]
        assert max(draw(wide[:, :13], rows)) < 13


def chi_square_bound(cells: int) -> float:
    """Above this with a probability of about 1e-6 (Wilson-Hilferty)."""
    freedom = cells - 1
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float((((counts - expected) ** 2) / expected).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7),
        Sampling(temperature=2.0, top_k=5),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.5, top_k=8, top_p=0.9),
    ],
    ids=str,
)
@pytest.mark.parametrize("counter", ["seed", "output_index"])
def test_draws_follow_the_distribution(
    dtype: torch.dtype, sampling: Sampling, counter: str
) -> None:
    """20,000 draws over seeds, and over positions of one seed, against the exact probabilities."""
    draws, vocab = 20_000, 12
    logits = random_logits(1, vocab, seed=3, scale=1.5).to(dtype)
    batch = SamplingBatch.from_rows([row(sampling)])
    many = {
        name: getattr(batch, name).expand(draws).clone()
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
            "output_index",
            "min_remaining",
        )
    }
    many[counter] = torch.arange(draws)
    tokens = sample(
        logits.expand(draws, vocab),
        SamplingBatch(
            **many,
            stop_ids=torch.zeros((draws, 0), dtype=torch.int64),
            any_truncated=batch.any_truncated,
            any_min_p=batch.any_min_p,
            any_masked=False,
        ),
    )
    counts = np.bincount(tokens.numpy(), minlength=vocab)
    expected = exact_probabilities(logits[0].double().numpy(), sampling)
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert chi_square(counts[kept], expected[kept]) < chi_square_bound(int(kept.sum()))


def exact_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Temperature, then top_k, then top_p over what top_k left."""
    scaled = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-scaled, kind="stable")
    kept = order[: sampling.top_k or None]
    share = scaled[kept] / scaled[kept].sum()
    kept = kept[(np.cumsum(share) - share) < sampling.top_p]
    result = np.zeros_like(scaled)
    result[kept] = scaled[kept] / scaled[kept].sum()
    return result


def test_noise_is_uniform_and_uncorrelated() -> None:
    """Bits of neighbouring seeds, positions and tokens: each bit half the time, no pair agrees."""
    bits = noise_bits(
        torch.arange(8).repeat(16), torch.arange(16).repeat_interleave(8), torch.arange(128)
    )
    unpacked = ((bits.flatten()[:, None] >> torch.arange(64)) & 1).double()
    assert float((unpacked.mean(0) - 0.5).abs().max()) < 0.5 * 5 / math.sqrt(len(unpacked))
    centred = (bits.double() / 2**63).flatten()
    for step in (1, 128, 1024, 2048):
        correlation = float((centred[:-step] * centred[step:]).mean()) * 3
        assert abs(correlation) < 5 / math.sqrt(len(centred) - step)
    assert len(bits.unique()) == bits.numel()


def test_noise_bits_are_splitmix64() -> None:
    """Against the same in Python's integers: the integers are exact on every device."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    seeds, indexes = [0, 1, -1, 2**63 - 1, -(2**63)], [0, 1, 5, 10**6, 2**40]
    got = noise_bits(torch.tensor(seeds), torch.tensor(indexes), torch.arange(50))
    for s, (seed, index) in enumerate(zip(seeds, indexes, strict=True)):
        key = mix((seed * 0x94D049BB133111EB + (index + 1) * golden) & mask)
        for token in range(50):
            expected = mix((key + (token + 1) * golden) & mask)
            assert int(got[s, token]) & mask == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gumbel_noise_is_finite_and_gumbel(dtype: torch.dtype) -> None:
    noise = gumbel_noise(torch.arange(100), torch.arange(100), torch.arange(1000), dtype)
    assert noise.dtype == dtype
    assert bool(noise.isfinite().all())
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.05


def test_float32_and_float64_draw_alike() -> None:
    """The same noise but for rounding: nearly always the same token."""
    logits = random_logits(400, 50)
    rows = [row(Sampling(temperature=1.0, seed=i), output_index=i % 7) for i in range(400)]
    same = sum(a == b for a, b in zip(draw(logits, rows), draw(logits.double(), rows), strict=True))
    assert same >= 399


def mixed_rows(count: int) -> list[Row]:
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for i in range(count):
        sampling = Sampling(
            temperature=float(rng.choice([0.0, 0.3, 1.0, 5.0])),
            top_p=float(rng.choice([1.0, 0.9, 0.2])),
            top_k=int(rng.choice([0, 1, 3, 40, 10**6])),
            seed=int(rng.integers(-(2**63), 2**63 - 1)),
        )
        stops = tuple(int(t) for t in rng.integers(0, 300, int(rng.integers(0, 4))))
        rows.append(row(sampling, output_index=i, stop_ids=stops, min_remaining=i % 3))
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_token_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    """Also where company switches paths: sorted or not, masked or not, random or all greedy."""
    rows, logits = mixed_rows(40), random_logits(40, 300).to(dtype)
    alone = [draw(logits[i : i + 1], [rows[i]])[0] for i in range(40)]
    assert draw(logits, rows) == alone
    rng = np.random.default_rng(1)
    for _ in range(20):
        chosen = [int(i) for i in rng.permutation(40)[: int(rng.integers(1, 40))]]
        assert draw(logits[chosen], [rows[i] for i in chosen]) == [alone[i] for i in chosen]


def test_seed_position_and_row_order_are_what_matters() -> None:
    logits = random_logits(1, 200).expand(64, 200)
    sampling = Sampling(temperature=2.0, seed=7)
    by_position = draw(logits, [row(sampling, output_index=i) for i in range(64)])
    assert len(set(by_position)) > 20
    other = draw(
        logits, [row(Sampling(temperature=2.0, seed=8), output_index=i) for i in range(64)]
    )
    assert other != by_position
    batch = SamplingBatch.from_rows([row(sampling)])
    advanced: list[int] = []
    for _ in range(64):
        advanced.append(int(sample(logits[:1], batch)[0]))
        batch.advance_()
    assert advanced == by_position


def test_stop_ids_are_masked_while_tokens_are_still_due() -> None:
    logits = torch.zeros(3, 10)
    logits[:, 4], logits[:, 7], logits[:, 2] = 9.0, 8.0, 7.0
    rows = [
        row(stop_ids=(4, 7, 99), min_remaining=1),
        row(stop_ids=(4,), min_remaining=0),
        row(Sampling(temperature=0.01), stop_ids=(4,), min_remaining=2),
    ]
    batch = SamplingBatch.from_rows(rows)
    assert [int(t) for t in sample(logits, batch)] == [2, 4, 7]
    batch.advance_()
    assert [int(t) for t in sample(logits, batch)] == [4, 4, 7]
    batch.advance_()
    assert [int(t) for t in sample(logits, batch)] == [4, 4, 4]


def test_top_k_one_and_tiny_top_p_are_greedy() -> None:
    logits = random_logits(50, 300)
    greedy = draw(logits, [row()] * 50)
    for sampling in (
        Sampling(temperature=9.0, top_k=1),
        Sampling(temperature=9.0, top_p=1e-9),
        Sampling(temperature=1e-30),
    ):
        assert draw(logits, [row(sampling, output_index=i) for i in range(50)]) == greedy


def test_rows_that_do_not_sample_are_left_out() -> None:
    silent = Row(
        request=RequestId(1), slot=SlotId(1), start=0, num_tokens=3, input=(1, 2, 3), sample=None
    )
    batch = SamplingBatch.from_rows([silent, row(), silent])
    assert batch.temperature.shape == (1,)
    assert not (batch.any_random or batch.any_truncated or batch.any_masked)
    assert sample(torch.zeros(0, 8), SamplingBatch.from_rows([silent])).shape == (0,)

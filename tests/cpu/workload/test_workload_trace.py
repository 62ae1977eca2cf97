"""Parsing, scaling and spreading of traces; generators; the shipped slice."""

import itertools
import statistics
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.core.errors import WeftError
from weft.workload.generators import gamma_arrivals, poisson_arrivals, uniform_rows
from weft.workload.trace import (
    TraceRow,
    compress,
    cut,
    format_trace,
    parse_trace,
    scale_lengths,
    spread,
    zipf_shares,
)

HEADER = "timestamp,model,prompt_tokens,output_tokens\n"
SLICE = Path(__file__).parents[3] / "demo" / "data" / "azure_llm_2023_slice.csv"

rows_strategy = st.lists(
    st.builds(
        TraceRow,
        arrival_ns=st.integers(0, 10**7).map(lambda tenth_ms: tenth_ms * 100_000),
        service=st.sampled_from(["azure-code", "azure-conv"]),
        prompt_tokens=st.integers(1, 8000),
        output_tokens=st.integers(1, 2000),
    ),
    min_size=1,
    max_size=30,
).map(lambda rows: tuple(sorted(rows, key=lambda row: row.arrival_ns)))


def test_parses_comments_and_sorts() -> None:
    rows = parse_trace("# from somewhere\n" + HEADER + "2.5,b,10,20\n0.5,a,1,2\n")
    assert [(r.arrival_ns, r.service, r.prompt_tokens, r.output_tokens) for r in rows] == [
        (500_000_000, "a", 1, 2),
        (2_500_000_000, "b", 10, 20),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must be"),
        ("time,model\n1,a\n", "first line must be"),
        (HEADER + "1.0,a,5\n", "line 2: 3 columns"),
        (HEADER + "1.0,a,5,6\nsoon,a,5,6\n", "line 3: not a number"),
        (HEADER + "nan,a,5,6\n", "line 2: timestamp"),
        (HEADER + "-1,a,5,6\n", "line 2: timestamp"),
        (HEADER + "1,a,0,6\n", "line 2: token counts"),
        (HEADER + "1,a,5,99999999999\n", "line 2: token counts"),
    ],
)
def test_refuses_broken_traces_by_line(text: str, message: str) -> None:
    with pytest.raises(WeftError, match=message):
        parse_trace(text)


@given(rows_strategy)
def test_format_and_parse_are_inverse(rows: tuple[TraceRow, ...]) -> None:
    assert parse_trace(format_trace(rows)) == rows


@given(rows_strategy, st.integers(2, 9000), st.floats(0.05, 0.95))
def test_scaled_requests_fit_and_keep_their_order(
    rows: tuple[TraceRow, ...], context: int, share: float
) -> None:
    scaled = scale_lengths(rows, context, output_share=share)
    for before, after in zip(rows, scaled, strict=True):
        assert 1 <= after.prompt_tokens <= before.prompt_tokens
        assert 1 <= after.output_tokens <= before.output_tokens
        assert after.prompt_tokens + after.output_tokens <= context
    by_prompt = sorted(range(len(rows)), key=lambda i: rows[i].prompt_tokens)
    lengths = [scaled[i].prompt_tokens for i in by_prompt]
    assert lengths == sorted(lengths)


@given(rows_strategy, st.integers(1, 40))
def test_cut_begins_at_zero(rows: tuple[TraceRow, ...], limit: int) -> None:
    kept = cut(rows, limit)
    assert len(kept) == min(limit, len(rows))
    assert kept[0].arrival_ns == 0
    assert kept[-1].arrival_ns == rows[len(kept) - 1].arrival_ns - rows[0].arrival_ns
    assert cut((), 3) == ()


def test_compression_divides_time_only() -> None:
    rows = parse_trace(HEADER + "0,a,5,6\n10,a,7,8\n")
    fast = compress(rows, 4)
    assert [row.arrival_ns for row in fast] == [0, 2_500_000_000]
    assert [row.prompt_tokens for row in fast] == [5, 7]
    with pytest.raises(WeftError, match="above 0"):
        compress(rows, 0)


def test_zipf_shares() -> None:
    assert zipf_shares(4, 0) == (0.25,) * 4
    shares = zipf_shares(3, 1)
    assert shares == pytest.approx((6 / 11, 3 / 11, 2 / 11))
    with pytest.raises(WeftError):
        zipf_shares(0, 1)


def test_spread_follows_the_skew_and_the_seed() -> None:
    rows = uniform_rows(
        poisson_arrivals(10, 4000, seed=1), prompt_tokens=(1, 9), output_tokens=(2, 4), seed=1
    )
    arrivals = spread(rows, ["a", "b", "c"], skew=1, seed=3)
    counts = Counter(arrival.model for arrival in arrivals)
    for model, share in zip("abc", zipf_shares(3, 1), strict=True):
        assert counts[model] / 4000 == pytest.approx(share, abs=0.03)
    assert arrivals == spread(rows, ["a", "b", "c"], skew=1, seed=3)
    assert arrivals != spread(rows, ["a", "b", "c"], skew=1, seed=4)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gamma_gaps_have_the_mean_and_variation_asked_for(cv: float) -> None:
    times = (0, *gamma_arrivals(5, 20_000, cv=cv, seed=7))
    gaps = [(b - a) / 1e9 for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.08)
    assert statistics.pstdev(gaps) / 0.2 == pytest.approx(cv, rel=0.12, abs=1e-6)


def test_generators_repeat_by_seed_and_refuse_nonsense() -> None:
    assert poisson_arrivals(2, 50, seed=1) == poisson_arrivals(2, 50, seed=1)
    assert poisson_arrivals(2, 50, seed=1) != poisson_arrivals(2, 50, seed=2)
    with pytest.raises(WeftError):
        poisson_arrivals(0, 5, seed=1)
    with pytest.raises(WeftError):
        uniform_rows((1,), prompt_tokens=(0, 3), output_tokens=(1, 1), seed=0)


def test_the_shipped_slice_is_contiguous_and_holds_both_services() -> None:
    text = SLICE.read_text(encoding="utf-8")
    rows = parse_trace(text, source=SLICE.name)
    assert 200 <= len(rows) <= 500
    services = Counter(row.service for row in rows)
    assert set(services) == {"azure-code", "azure-conv"}
    assert min(services.values()) >= 50
    assert "CC-BY 4.0" in text

"""The worked example, edge cases, and laws of the attainment figures."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.slo.attainment import (
    Outcome,
    Slo,
    attainment,
    deadline_ns,
    gaps_ns,
    make_slo,
    qos_share,
    request_met,
    strict_share,
    tokens_in_time,
)
from weft.slo.percentiles import percentile

S = 1_000_000_000
SLO_3_2 = make_slo(3, 2)

times = st.lists(st.integers(0, 30 * S), min_size=1, max_size=12).map(sorted).map(tuple)
outcomes = st.builds(
    lambda arrival, gaps: Outcome(
        arrival_ns=arrival, token_ns=tuple(arrival + t for t in np.cumsum(gaps).tolist())
    ),
    st.integers(0, 10 * S),
    st.lists(st.integers(0, 5 * S), min_size=1, max_size=12),
)
slos = st.builds(
    lambda ttft, tbt: Slo(ttft_ns=ttft, tbt_ns=tbt), st.integers(0, 12 * S), st.integers(0, 3 * S)
)


def at(*seconds: float, arrival: float = 0, failed: bool = False, expected: int = 0) -> Outcome:
    return Outcome(
        arrival_ns=round(arrival * S),
        token_ns=tuple(round(s * S) for s in seconds),
        failed=failed,
        expected_tokens=expected,
    )


def test_qos_worked_example_of_the_artifact() -> None:
    assert qos_share(SLO_3_2, at(3, 6, 7, 8)) == pytest.approx(5 / 8)


def test_qos_forgives_a_stall_after_a_miss_as_the_artifact_does() -> None:
    """The clock restarts at 11, but the target keeps the size of the TTFT: 7 s pass as kept."""
    assert qos_share(make_slo(10, 0.1), at(11, 18)) == pytest.approx(7 / 18)


def test_strict_on_the_same_example() -> None:
    # Due at 3, 5, 7, 9: only the second is late.
    assert strict_share(SLO_3_2, at(3, 6, 7, 8)) == pytest.approx(3 / 4)


def test_the_figures_differ_on_a_late_first_token() -> None:
    """Twelve seconds of waiting, then fast: qos loses the wait, strict catches up."""
    slo = make_slo(10, 0.1)
    late = at(*(12 + 3 * i / 100 for i in range(101)))
    assert qos_share(slo, late) == pytest.approx(3 / 15)
    assert strict_share(slo, late) > 0.7
    assert not request_met(slo, late)


def test_deadlines_advance_from_the_arrival() -> None:
    slo = make_slo(10, 0.1)
    assert deadline_ns(slo, 5 * S, 0) == 15 * S
    assert deadline_ns(slo, 5 * S, 7) == 15 * S + 700_000_000


@pytest.mark.parametrize("failed", [at(1, 2, failed=True, expected=10), at(expected=10)])
def test_a_failed_request_counts_zero_in_every_figure(failed: Outcome) -> None:
    kept = at(1, 2)
    result = attainment([(SLO_3_2, failed), (SLO_3_2, kept)])
    assert (result.requests, result.failed) == (2, 1)
    assert (result.strict, result.qos, result.request) == (0.5, 0.5, 0.5)
    assert result.strict_token_weighted == pytest.approx(2 / 12)


def test_nothing_scores_nothing() -> None:
    assert attainment([]).requests == 0
    assert attainment([]).strict == 0.0


def test_one_token_has_no_gap_to_miss() -> None:
    assert request_met(make_slo(1, 0), at(1))


def test_a_stall_breaks_the_request_figure_but_not_the_ttft() -> None:
    slo = make_slo(3, 2)
    assert request_met(slo, at(1, 2, 3))
    assert not request_met(slo, at(*range(1, 20), 29))


@given(slos, outcomes)
def test_shares_lie_between_nothing_and_all(slo: Slo, outcome: Outcome) -> None:
    assert 0 <= strict_share(slo, outcome) <= 1
    assert 0 <= qos_share(slo, outcome) <= 1 + 1e-12


@given(slos, outcomes, st.integers(0, 10 * S))
def test_only_times_relative_to_the_arrival_matter(slo: Slo, outcome: Outcome, by: int) -> None:
    moved = Outcome(
        arrival_ns=outcome.arrival_ns + by, token_ns=tuple(t + by for t in outcome.token_ns)
    )
    assert attainment([(slo, moved)]) == attainment([(slo, outcome)])


@given(slos, outcomes, st.data())
def test_a_token_that_comes_earlier_never_hurts_strict(
    slo: Slo, outcome: Outcome, data: st.DataObject
) -> None:
    which = data.draw(st.integers(0, len(outcome.token_ns) - 1))
    before = outcome.token_ns[which - 1] if which else outcome.arrival_ns
    earlier = data.draw(st.integers(before, outcome.token_ns[which]))
    tokens = (*outcome.token_ns[:which], earlier, *outcome.token_ns[which + 1 :])
    better = Outcome(arrival_ns=outcome.arrival_ns, token_ns=tokens)
    assert strict_share(slo, better) >= strict_share(slo, outcome)


@given(outcomes, st.integers(0, 12 * S), st.integers(0, 3 * S), st.integers(0, S))
def test_a_looser_objective_never_scores_less(
    outcome: Outcome, ttft: int, tbt: int, more: int
) -> None:
    tight = Slo(ttft_ns=ttft, tbt_ns=tbt)
    for loose in (Slo(ttft_ns=ttft + more, tbt_ns=tbt), Slo(ttft_ns=ttft, tbt_ns=tbt + more)):
        assert strict_share(loose, outcome) >= strict_share(tight, outcome)
        assert request_met(loose, outcome) >= request_met(tight, outcome)


@given(slos, outcomes)
def test_all_figures_are_one_when_every_deadline_is_kept(slo: Slo, outcome: Outcome) -> None:
    kept = Outcome(
        arrival_ns=outcome.arrival_ns,
        token_ns=tuple(
            deadline_ns(slo, outcome.arrival_ns, i) for i in range(len(outcome.token_ns))
        ),
    )
    result = attainment([(slo, kept)])
    assert (result.strict, result.strict_token_weighted, result.request) == (1, 1, 1)
    assert result.qos == pytest.approx(1)


@given(st.lists(st.tuples(slos, outcomes), min_size=1, max_size=6))
def test_summary_is_the_mean_and_the_pooled_ratio(pairs: list[tuple[Slo, Outcome]]) -> None:
    result = attainment(pairs)
    counts = [tokens_in_time(slo, outcome) for slo, outcome in pairs]
    mean = sum(Fraction(met, total) for met, total in counts) / len(pairs)
    pooled = Fraction(sum(m for m, _ in counts), sum(t for _, t in counts))
    assert math.isclose(result.strict, mean, abs_tol=1e-12)
    assert math.isclose(result.strict_token_weighted, pooled, abs_tol=1e-12)


@given(times)
def test_gaps_add_up(token_ns: tuple[int, ...]) -> None:
    gaps = gaps_ns(token_ns)
    assert len(gaps) == len(token_ns) - 1
    assert sum(gaps) == token_ns[-1] - token_ns[0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100, allow_nan=False))
def test_percentile_agrees_with_numpy(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-6)


def test_percentile_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)
    with pytest.raises(ValueError, match="outside"):
        percentile([1.0], 101)

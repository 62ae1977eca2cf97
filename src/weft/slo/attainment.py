"""Deadlines of tokens and how well they were kept.

Three figures, because published systems use different ones (all are shares in 0..1, all count a
failed request as 0):

- strict: the share of a request's tokens that came by their deadline, averaged over requests;
  token-weighted: the same over all tokens of all requests.
- qos: the time-weighted figure of Aegaeon's artifact (SOSP'25). After a miss its clock restarts but
  keeps a target the size of the TTFT, so later stalls are forgiven, while the whole stretch before
  a late first token is lost. For comparison with that paper only.
- request: the share of requests whose TTFT and whose 99th percentile of the time between tokens
  both kept to the objective.

Times are integer nanoseconds on one clock.
"""

import itertools
from collections.abc import Iterable, Sequence

import msgspec

from weft.slo.percentiles import percentile


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """Objectives of a model: time to first token, time between tokens."""

    ttft_ns: int
    tbt_ns: int


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request: when it arrived and when each of its tokens came."""

    arrival_ns: int
    token_ns: tuple[int, ...]
    """Ascending."""
    failed: bool = False
    """Ended in an error or was cut short. One without any token counts as failed too: nothing of
    it can be measured, and skipping it would flatter the result."""
    expected_tokens: int = 0
    """How many were asked for; weighs a failed request in the token-weighted figure."""


class Attainment(msgspec.Struct, frozen=True, kw_only=True):
    """Shares in 0..1 over a set of requests; all 0 where there are none."""

    requests: int
    failed: int
    strict: float
    strict_token_weighted: float
    qos: float
    request: float


def make_slo(ttft_s: float, tbt_s: float) -> Slo:
    return Slo(ttft_ns=round(ttft_s * 1e9), tbt_ns=round(tbt_s * 1e9))


def deadline_ns(slo: Slo, arrival_ns: int, token: int) -> int:
    """When token number `token` (from 0) is due. An early token buys slack for the later ones."""
    return arrival_ns + slo.ttft_ns + token * slo.tbt_ns


def gaps_ns(token_ns: Sequence[int]) -> list[int]:
    """Times between consecutive tokens: one fewer than tokens."""
    return [after - before for before, after in itertools.pairwise(token_ns)]


def did_fail(outcome: Outcome) -> bool:
    return outcome.failed or not outcome.token_ns


def tokens_in_time(slo: Slo, outcome: Outcome) -> tuple[int, int]:
    """(tokens by their deadline, tokens that count). A failed request: (0, those expected)."""
    if did_fail(outcome):
        return 0, max(outcome.expected_tokens, len(outcome.token_ns), 1)
    met = sum(
        at <= deadline_ns(slo, outcome.arrival_ns, i) for i, at in enumerate(outcome.token_ns)
    )
    return met, len(outcome.token_ns)


def strict_share(slo: Slo, outcome: Outcome) -> float:
    met, total = tokens_in_time(slo, outcome)
    return met / total


def qos_share(slo: Slo, outcome: Outcome) -> float:
    """Aegaeon's artifact, plot_e2e: seconds kept over seconds from arrival to the last token.

    A request whose last token came at the instant it arrived scores 1.
    """
    if did_fail(outcome):
        return 0.0
    start, target, accum, kept = outcome.arrival_ns, slo.ttft_ns, 0, 0
    for at in outcome.token_ns:
        if at - start <= target:
            accum = target
        else:
            kept += accum
            start, accum = at, 0
        target += slo.tbt_ns
    last = outcome.token_ns[-1]
    kept += min(target, last - start)
    whole = last - outcome.arrival_ns
    return kept / whole if whole > 0 else 1.0


def request_met(slo: Slo, outcome: Outcome) -> bool:
    """TTFT met and the 99th percentile of the gaps met (one token: no gap, met)."""
    if did_fail(outcome) or outcome.token_ns[0] - outcome.arrival_ns > slo.ttft_ns:
        return False
    gaps = gaps_ns(outcome.token_ns)
    return not gaps or percentile(gaps, 99) <= slo.tbt_ns


def attainment(requests: Iterable[tuple[Slo, Outcome]]) -> Attainment:
    """All figures over requests, each with the objectives of its model."""
    pairs = list(requests)
    if not pairs:
        return Attainment(
            requests=0, failed=0, strict=0.0, strict_token_weighted=0.0, qos=0.0, request=0.0
        )
    counts = [tokens_in_time(slo, outcome) for slo, outcome in pairs]
    num = len(pairs)
    return Attainment(
        requests=num,
        failed=sum(did_fail(outcome) for _, outcome in pairs),
        strict=sum(met / total for met, total in counts) / num,
        strict_token_weighted=sum(met for met, _ in counts) / sum(total for _, total in counts),
        qos=sum(qos_share(slo, outcome) for slo, outcome in pairs) / num,
        request=sum(request_met(slo, outcome) for slo, outcome in pairs) / num,
    )

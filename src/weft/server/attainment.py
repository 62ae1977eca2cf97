"""How well the objectives of models were kept, as a frontend sees it.

The figure is `strict` of `weft.slo.attainment`: the share of a request's tokens that came by their
deadline; a failed request counts 0, a cancelled one not at all.
"""

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Summary

from weft.hub.base import ModelCard
from weft.slo.attainment import Slo, deadline_ns, make_slo


class Deadlines:
    """The tokens of one answer, counted as they come."""

    def __init__(self, arrival_s: float, slo: Slo) -> None:
        self._arrival_ns = round(arrival_s * 1e9)
        self._slo = slo
        self.tokens = 0
        self.in_time = 0

    def came(self, tokens: int, now_s: float) -> None:
        """So many tokens came together."""
        now_ns = round(now_s * 1e9)
        for token in range(self.tokens, self.tokens + tokens):
            self.in_time += now_ns <= deadline_ns(self._slo, self._arrival_ns, token)
        self.tokens += tokens


def slo_of(card: ModelCard) -> Slo:
    return make_slo(card.ttft_slo_s, card.tbt_slo_s)


class Ended(Protocol):
    """An answer that has ended."""

    deadlines: Deadlines
    outcome: str | None


class AttainmentMetrics:
    """Sums from which a query makes averages over any time."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._shares = Summary(
            "weft_slo_attainment",
            "Share of a request's tokens that came by their deadline.",
            ["model"],
            registry=registry,
        )
        self._tokens = Counter(
            "weft_slo_tokens", "Tokens that had a deadline.", ["model"], registry=registry
        )
        self._in_time = Counter(
            "weft_slo_tokens_in_time",
            "Of them, those that came by it.",
            ["model"],
            registry=registry,
        )

    def ended(self, model: str, answer: Ended) -> None:
        found = answer.deadlines
        if answer.outcome == "cancelled" or (answer.outcome != "error" and not found.tokens):
            return
        in_time = 0 if answer.outcome == "error" else found.in_time
        self._shares.labels(model).observe(in_time / max(found.tokens, 1))
        self._tokens.labels(model).inc(max(found.tokens, 1))
        self._in_time.labels(model).inc(in_time)

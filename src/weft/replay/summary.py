"""From records to the rows of the table. Pure."""

from collections.abc import Mapping, Sequence

from weft.replay.records import Counter, ModelFacts, Record, Summary
from weft.slo.attainment import Slo, attainment, gaps_ns, make_slo
from weft.slo.percentiles import percentile

DEFAULT_TTFT_S = 10.0
DEFAULT_TBT_S = 0.1


def slo_of(facts: ModelFacts | None) -> Slo:
    """A model's objectives; weft's defaults where the endpoint does not tell."""
    ttft_s = facts.ttft_slo_s if facts and facts.ttft_slo_s is not None else DEFAULT_TTFT_S
    tbt_s = facts.tbt_slo_s if facts and facts.tbt_slo_s is not None else DEFAULT_TBT_S
    return make_slo(ttft_s, tbt_s)


def switches_between(
    before: Mapping[str, Counter] | None, after: Mapping[str, Counter] | None
) -> dict[str, Counter] | None:
    """Switches during the replay. A unit that was restarted meanwhile counts from 0 again, so a
    count below the one before stands as it is."""
    if before is None or after is None:
        return None
    deltas: dict[str, Counter] = {}
    for name, now in after.items():
        old = before.get(name, Counter())
        restarted = now.switches_in < old.switches_in or now.switches_out < old.switches_out
        base = Counter() if restarted else old
        deltas[name] = Counter(
            switches_in=now.switches_in - base.switches_in,
            switches_out=now.switches_out - base.switches_out,
        )
    return deltas


def _percentile_s(values_ns: Sequence[int], q: float) -> float | None:
    return percentile(values_ns, q) / 1e9 if values_ns else None


def summarise(
    name: str,
    records: Sequence[Record],
    slos: Mapping[str, Slo],
    *,
    seconds: float,
    switches: Counter | None,
) -> Summary:
    """One row over `records`; `slos` gives every model's objectives."""
    good = [record for record in records if record.error is None]
    tokens = [record.token_ns() for record in good]
    ttft_ns = [
        times[0] - record.arrival_ns for record, times in zip(good, tokens, strict=True) if times
    ]
    tbt_ns = [gap for times in tokens for gap in gaps_ns(times)]
    output = sum(record.output_tokens for record in records)
    shares = attainment((slos[record.model], record.outcome()) for record in records)
    used = {slos[record.model] for record in records}
    slo = used.pop() if len(used) == 1 else None
    return Summary(
        model=name,
        requests=len(records),
        failures=len(records) - len(good),
        prompt_tokens=sum(record.prompt_tokens for record in records),
        output_tokens=output,
        ttft_p50_s=_percentile_s(ttft_ns, 50),
        ttft_p99_s=_percentile_s(ttft_ns, 99),
        tbt_p50_s=_percentile_s(tbt_ns, 50),
        tbt_p99_s=_percentile_s(tbt_ns, 99),
        tokens_per_s=output / seconds if seconds > 0 else 0.0,
        switches_in=switches.switches_in if switches else None,
        switches_out=switches.switches_out if switches else None,
        ttft_slo_s=slo.ttft_ns / 1e9 if slo else None,
        tbt_slo_s=slo.tbt_ns / 1e9 if slo else None,
        slo_request=shares.request,
        slo_strict=shares.strict,
        slo_strict_token_weighted=shares.strict_token_weighted,
        slo_qos=shares.qos,
    )


def summaries(
    models: Sequence[ModelFacts],
    records: Sequence[Record],
    switches: Mapping[str, Counter] | None,
    *,
    seconds: float,
) -> tuple[tuple[Summary, ...], Summary]:
    """(a row per model in the given order, the row over all)."""
    slos = {facts.name: slo_of(facts) for facts in models}
    rows = tuple(
        summarise(
            facts.name,
            [record for record in records if record.model == facts.name],
            slos,
            seconds=seconds,
            switches=None if switches is None else switches.get(facts.name, Counter()),
        )
        for facts in models
    )
    whole = None
    if switches is not None:
        mine = [switches.get(facts.name, Counter()) for facts in models]
        whole = Counter(
            switches_in=sum(counter.switches_in for counter in mine),
            switches_out=sum(counter.switches_out for counter in mine),
        )
    return rows, summarise("all", records, slos, seconds=seconds, switches=whole)

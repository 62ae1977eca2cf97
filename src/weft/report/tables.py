"""Results as tables for a terminal."""

from collections.abc import Sequence

from rich.box import HEAVY_HEAD
from rich.table import Table

from weft.replay.records import Record, Result, Summary


def seconds_text(value_s: float | None) -> str:
    """Three digits that matter, in the unit that suits: 0.0042 -> "4.20 ms"."""
    if value_s is None:
        return "-"
    if value_s >= 100:
        return f"{value_s:.0f} s"
    if value_s >= 1:
        return f"{value_s:.2f} s"
    return f"{value_s * 1e3:.3g} ms"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _row(row: Summary, digits: int) -> list[str]:
    return [
        row.model,
        _count(row.requests),
        _count(row.failures),
        seconds_text(row.ttft_p50_s),
        seconds_text(row.ttft_p99_s),
        seconds_text(row.tbt_p50_s),
        seconds_text(row.tbt_p99_s),
        f"{row.tokens_per_s:,.{digits}f}",
        _count(row.switches_in),
        _count(row.switches_out),
        f"{row.slo_request:.{digits}%}",
        f"{row.slo_strict:.{digits}%}",
    ]


HEADINGS = (
    "model",
    "requests",
    "failures",
    "TTFT p50",
    "TTFT p99",
    "TBT p50",
    "TBT p99",
    "tokens/s",
    "in",
    "out",
    "SLO met",
    "strict",
)
NARROW_HEADINGS = (
    "model",
    "reqs",
    "fail",
    "TTFT\np50",
    "TTFT\np99",
    "TBT\np50",
    "TBT\np99",
    "tok/s",
    "in",
    "out",
    "SLO\nmet",
)
WIDE_COLUMNS = 120
"""Terminals narrower than this get the narrow form: no lines, no `strict`, fewer digits."""


def replay_table(result: Result, columns: int = WIDE_COLUMNS) -> Table:
    """A row per model and one over all: latencies, speed, switches in and out, attainment.
    `columns`: width of the terminal."""
    wide = columns >= WIDE_COLUMNS
    table = Table(
        header_style="bold",
        box=HEAVY_HEAD if wide else None,
        padding=(0, 1) if wide else (0, 1, 0, 0),
        pad_edge=wide,
    )
    for heading in HEADINGS if wide else NARROW_HEADINGS:
        is_name = heading == "model"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=not is_name)
    digits, kept = (1, len(HEADINGS)) if wide else (0, len(NARROW_HEADINGS))
    for row in result.models:
        table.add_row(*_row(row, digits)[:kept])
    table.add_section()
    table.add_row(*_row(result.total, digits)[:kept], style="bold")
    return table


def slo_text(rows: Sequence[Summary]) -> str:
    """The objectives in words, where all models share them."""
    pairs = {(row.ttft_slo_s, row.tbt_slo_s) for row in rows}
    if len(pairs) == 1:
        ((ttft_s, tbt_s),) = pairs
        return f"TTFT {seconds_text(ttft_s)}, TBT {seconds_text(tbt_s)}"
    return "each model's own"


def failure_lines(records: Sequence[Record], limit: int = 5) -> list[str]:
    """Failures by cause, the most frequent first."""
    causes: dict[str, list[Record]] = {}
    for record in records:
        if record.error is not None:
            causes.setdefault(record.error, []).append(record)
    ordered = sorted(causes.items(), key=lambda item: -len(item[1]))
    lines = [
        f"{len(found)} x {cause} (first: request {found[0].index} to {found[0].model})"
        for cause, found in ordered[:limit]
    ]
    if len(ordered) > limit:
        lines.append(f"and {len(ordered) - limit} other causes")
    return lines


def legend(result: Result) -> list[str]:
    """What the columns mean, and what was done."""
    lines = [
        f"{result.workload}",
        f"{result.total.requests} requests in {result.seconds:.1f} s, "
        f"{result.total.output_tokens:,} tokens out; "
        f"SLO: {slo_text(result.models)}. "
        "SLO met: TTFT and p99 TBT within it; strict: tokens by their deadline.",
    ]
    if result.total.switches_in is not None:
        lines.append("in, out: how often the model's weights came onto the device and left it.")
    if result.worst_send_lag_s > 0.1:
        lines.append(
            f"The client itself was up to {seconds_text(result.worst_send_lag_s)} late in sending."
        )
    return lines

"""A picture of what a unit did: lanes over time, as SVG.

    python -m weft.report.timeline trace-unit0-1.jsonl --out switch.svg

One lane for the steps of each model, and one each for loads, parks, resumes and maps. Colours mean
models; a hatched edge means that the action failed.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Annotated

import typer

from weft.core.errors import WeftError
from weft.report.trace_file import Header, Span, find_switch, read_worker_trace

COLOURS = (
    "#4269d0", "#efb118", "#3ca951", "#ff725c", "#a463f2", "#97bbf5", "#9c6b4e", "#6cc5b0",
    "#ff8ab7", "#9498a0",
)  # fmt: skip
LEFT, TOP, LANE, GAP, BOTTOM = 150, 64, 26, 8, 44
MIN_WIDTH_PX = 1.2
"""Actions shorter than a pixel are drawn this wide, so that they are seen."""
TEXT = 'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#1b1e23"'
SMALL = TEXT.replace("12", "10")
MAX_SPANS = 20_000


def lane_of(span: Span) -> str | None:
    """The lane's title; None for what is not drawn."""
    match span.kind:
        case "Run":
            return f"steps: {span.model}"
        case "Load":
            return "load weights"
        case "CopyKv":
            return "park KV" if span.to == "host" else "resume KV"
        case "Drop" | "MapKv" | "UnmapKv":
            return "map, unmap, drop"
    return None


def describe(span: Span) -> str:
    """The tooltip."""
    parts = [f"{span.kind} {span.model} #{span.id}".replace("  ", " ")]
    if span.kind == "Run":
        parts.append(
            f"{span.rows} rows ({span.prefill_rows} prefill), {span.iterations} iterations"
        )
    if span.bytes:
        parts.append(f"{span.bytes / 1e6:.1f} MB")
    if span.kv_tokens:
        parts.append(f"{span.kv_tokens} tokens of KV")
    if span.granules:
        parts.append(f"{span.granules} granules")
    parts.append(f"{(span.done_ns - span.begin_ns) / 1e6:.2f} ms")
    return ", ".join(parts) + ("" if span.ok else ", FAILED")


def tick_step(length_ns: int, wanted: int = 10) -> int:
    """1, 2 or 5 times a power of ten of ns, so that about `wanted` ticks fit."""
    raw = max(1, length_ns // wanted)
    power = int("1" + "0" * (len(str(raw)) - 1))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= raw)


def tick_text(ns: int, step: int) -> str:
    if step >= 1_000_000_000:
        return f"{ns / 1e9:g} s"
    if step >= 1_000_000:
        return f"{ns / 1e6:g} ms"
    return f"{ns / 1e3:g} µs"


def order_lanes(spans: Sequence[Span]) -> list[str]:
    """Steps first, in the order in which models first ran, then memory."""
    titles = [title for span in spans if (title := lane_of(span)) is not None]
    seen = list(dict.fromkeys(titles))
    memory = ["load weights", "park KV", "resume KV", "map, unmap, drop"]
    return [t for t in seen if t not in memory] + [t for t in memory if t in seen]


def timeline_svg(
    header: Header,
    spans: Sequence[Span],
    *,
    begin_ns: int,
    end_ns: int,
    width: int = 1100,
    title: str | None = None,
) -> str:
    """An SVG document of the spans that touch begin_ns..end_ns. Raises WeftError if there are none
    or too many to look at."""
    shown = [
        span
        for span in spans
        if span.done_ns >= begin_ns and span.begin_ns <= end_ns and lane_of(span) is not None
    ]
    if not shown or end_ns <= begin_ns:
        raise WeftError("nothing happened in that part of the trace; choose another")
    if len(shown) > MAX_SPANS:
        raise WeftError(f"{len(shown)} actions in that part of the trace; choose a shorter one")
    lanes = order_lanes(shown)
    models = list(dict.fromkeys(span.model for span in shown if span.model))
    colour = {model: COLOURS[i % len(COLOURS)] for i, model in enumerate(models)}
    scale = (width - LEFT - 20) / (end_ns - begin_ns)
    height = TOP + len(lanes) * (LANE + GAP) + BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" {TEXT} font-weight="bold">'
        f"{escape(title or f'unit {header.unit} on {header.device}')}</text>",
    ]
    out += _legend(models, colour)
    out += _axis(begin_ns, end_ns, scale, height)
    for index, lane in enumerate(lanes):
        y = TOP + index * (LANE + GAP)
        out.append(f'<text x="12" y="{y + LANE * 0.65:.0f}" {TEXT}>{escape(lane)}</text>')
        out.append(
            f'<line x1="{LEFT}" y1="{y + LANE}" x2="{width - 20}" y2="{y + LANE}" '
            'stroke="#e4e6ea"/>'
        )
        for span in shown:
            if lane_of(span) == lane:
                out.append(_bar(span, y, begin_ns, end_ns, scale, colour))
    return "\n".join([*out, "</svg>", ""])


def _legend(models: Sequence[str], colour: dict[str, str]) -> list[str]:
    out, x = [], LEFT
    for model in models:
        out.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{colour[model]}"/>')
        out.append(f'<text x="{x + 17}" y="44" {TEXT}>{escape(model)}</text>')
        x += 34 + 7 * len(model)
    return out


def _axis(begin_ns: int, end_ns: int, scale: float, height: int) -> list[str]:
    step = tick_step(end_ns - begin_ns)
    out = []
    for at in range(0, end_ns - begin_ns + 1, step):
        x = LEFT + at * scale
        y = height - BOTTOM + 8
        out.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{y}" stroke="#eef0f3"/>')
        out.append(
            f'<text x="{x:.1f}" y="{y + 14}" {SMALL} text-anchor="middle">'
            f"{tick_text(at, step)}</text>"
        )
    return out


def _bar(
    span: Span, y: int, begin_ns: int, end_ns: int, scale: float, colour: dict[str, str]
) -> str:
    first, last = max(span.begin_ns, begin_ns), min(span.done_ns, end_ns)
    x = LEFT + (first - begin_ns) * scale
    wide = max((last - first) * scale, MIN_WIDTH_PX)
    # Prefill stands taller than decode: a switch is read from where tokens stop and start again.
    inset = 5 if span.kind == "Run" and not span.prefill_rows else 1
    edge = "" if span.ok else ' stroke="#c00000" stroke-dasharray="3 2"'
    return (
        f'<rect x="{x:.2f}" y="{y + inset}" width="{wide:.2f}" height="{LANE - 2 * inset}" '
        f'fill="{colour.get(span.model, "#9498a0")}" fill-opacity="0.85"{edge}>'
        f"<title>{escape(describe(span))}</title></rect>"
    )


def draw(
    trace: Annotated[Path, typer.Argument(help="A worker's trace-unit*.jsonl.")],
    out: Annotated[Path, typer.Option(help="The SVG to write.")],
    from_s: Annotated[
        float | None, typer.Option(help="Seconds after the first action. Default: a switch.")
    ] = None,
    length_s: Annotated[float, typer.Option(help="How much of it, with --from-s.")] = 1.0,
    title: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Draw a part of a worker's trace; by default the switch that moved most KV."""
    header, spans = read_worker_trace(trace)
    if not spans:
        raise WeftError(f"{trace}: no action in it")
    if from_s is None:
        begin, end = find_switch(spans)
    else:
        begin = spans[0].begin_ns + round(from_s * 1e9)
        end = begin + round(length_s * 1e9)
    svg = timeline_svg(header, spans, begin_ns=begin, end_ns=end, title=title)
    out.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    typer.run(draw)

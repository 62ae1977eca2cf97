"""Traces are read as they are written, and drawn so that a switch can be seen."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from weft.core.errors import WeftError
from weft.report.timeline import describe, draw, tick_step, tick_text, timeline_svg
from weft.report.trace_file import find_switch, parse_worker_trace, read_worker_trace

MS = 1_000_000
HEADER = json.dumps({"weft_trace": 1, "unit": 0, "incarnation": 1, "device": "a <fast> one"})


def line(number: int, kind: str, begin_ms: float, end_ms: float, **facts: Any) -> str:
    return json.dumps(
        {
            "id": number,
            "kind": kind,
            "planned_ns": round(begin_ms * MS),
            "submitted_ns": round(begin_ms * MS),
            "done_ns": round(end_ms * MS),
            "device_ns": round((end_ms - begin_ms) * MS),
            "bytes": 0,
            "ok": True,
            "after": [],
            **facts,
        }
    )


def a_switch() -> list[str]:
    """a decodes, is parked and dropped; b is loaded, prefills and decodes."""
    run = {"rows": 2, "prefill_rows": 0, "iterations": 4, "tokens": 2}
    return [
        HEADER,
        line(1, "Run", 0, 10, model="a", **run),
        line(2, "CopyKv", 10, 14, model="a", bytes=8_000_000, to="host", kv_tokens=900),
        line(3, "UnmapKv", 14, 15, model="a", granules=2),
        line(4, "Drop", 15, 16, model="a", granules=5),
        line(5, "Load", 16, 30, model="b", bytes=5_000_000, granules=5),
        line(6, "MapKv", 16, 17, model="b", granules=1),
        line(7, "Run", 20, 36, model="b", **{**run, "prefill_rows": 2}),
        line(8, "Run", 36, 40, model="b", **run, ok=False),
        line(9, "Interrupt", 37, 37),
        line(10, "CopyKv", 40, 41, model="a", bytes=1_000_000, to="device"),
    ]


def test_reads_spans_by_their_beginning() -> None:
    header, spans = parse_worker_trace(a_switch())
    assert header.device == "a <fast> one"
    assert [span.id for span in spans] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert spans[4].begin_ns == 16 * MS


def test_a_line_cut_short_by_a_kill_is_passed_over_only_at_the_end() -> None:
    lines = [*a_switch(), '{"id": 11, "kind": "Ru']
    assert len(parse_worker_trace(lines)[1]) == 10
    with pytest.raises(WeftError, match="line 12"):
        parse_worker_trace([*lines, a_switch()[1]])
    with pytest.raises(WeftError, match="empty"):
        parse_worker_trace([])
    with pytest.raises(WeftError, match="line 1"):
        parse_worker_trace(["nonsense"])


def test_finds_the_switch_that_moved_most_and_was_clean() -> None:
    _, spans = parse_worker_trace(a_switch())
    assert find_switch(spans, margin_s=0.005) == (-5 * MS, 41 * MS)
    run = {"rows": 1, "prefill_rows": 0, "iterations": 1, "tokens": 1}
    bigger = [
        line(20, "Load", 50, 60, model="a", bytes=5_000_000, granules=5),
        line(21, "CopyKv", 61, 65, model="b", bytes=9_000_000, to="host"),
        line(22, "Run", 66, 70, model="a", **run),
    ]
    _, spans = parse_worker_trace([*a_switch(), *bigger])
    assert find_switch(spans, margin_s=0) == (20 * MS, 70 * MS)
    twice = line(23, "Load", 46, 48, model="a", bytes=5_000_000, granules=5)
    _, spans = parse_worker_trace([*a_switch(), twice, *bigger])
    assert find_switch(spans, margin_s=0) == (0, 36 * MS)


def test_says_when_there_is_no_switch() -> None:
    _, spans = parse_worker_trace(a_switch())
    with pytest.raises(WeftError, match="no switch to draw"):
        find_switch(spans[:3])
    with pytest.raises(WeftError, match="no switch to draw"):
        find_switch([])


def test_the_picture_has_a_lane_a_kind_and_a_bar_an_action() -> None:
    header, spans = parse_worker_trace(a_switch())
    svg = timeline_svg(header, spans, begin_ns=0, end_ns=42 * MS)
    root = ET.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    words = [text.text for text in root.iter(f"{space}text")]
    lanes = [w for w in words if w in {"steps: a", "steps: b", "load weights", "park KV"}]
    assert lanes == ["steps: a", "steps: b", "load weights", "park KV"]
    assert {"resume KV", "map, unmap, drop", "unit 0 on a <fast> one"} <= set(words)
    bars = [rect for rect in root.iter(f"{space}rect") if rect.find(f"{space}title") is not None]
    assert len(bars) == 9  # all but the Interrupt
    failed = [bar for bar in bars if bar.get("stroke-dasharray")]
    assert len(failed) == 1
    for bar in bars:
        assert 150 <= float(bar.get("x", "")) <= 1080
        assert float(bar.get("width", "")) > 0


def test_only_the_part_asked_for_is_drawn() -> None:
    header, spans = parse_worker_trace(a_switch())
    svg = timeline_svg(header, spans, begin_ns=0, end_ns=9 * MS)
    assert "steps: a" in svg
    assert "load weights" not in svg
    with pytest.raises(WeftError, match="nothing happened"):
        timeline_svg(header, spans, begin_ns=100 * MS, end_ns=200 * MS)


def test_tooltips_say_what_was_done() -> None:
    _, spans = parse_worker_trace(a_switch())
    assert describe(spans[1]) == "CopyKv a #2, 8.0 MB, 900 tokens of KV, 4.00 ms"
    assert describe(spans[7]).endswith("FAILED")


def test_ticks_are_round() -> None:
    assert [tick_step(n) for n in (42 * MS, 1_000_000_000, 7)] == [5 * MS, 100 * MS, 1]
    assert tick_text(1500 * MS, 500 * MS) == "1500 ms"
    assert tick_text(2_000_000_000, 1_000_000_000) == "2 s"
    assert tick_text(1500, 500) == "1.5 µs"


def test_the_command_draws_a_file(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "switch.svg"
    trace.write_text("\n".join(a_switch()) + "\n")
    assert len(read_worker_trace(trace)[1]) == 10
    app = Typer()
    app.command()(draw)
    result = CliRunner().invoke(app, [str(trace), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert ET.parse(out).getroot().tag.endswith("svg")
    with pytest.raises(WeftError, match="cannot be read"):
        read_worker_trace(tmp_path / "none")

"""Reads the trace a worker writes (`weft.worker.trace` documents the format)."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import msgspec

from weft.core.errors import WeftError

MAX_TRACE_BYTES = 1 << 30


class Header(msgspec.Struct, frozen=True, kw_only=True):
    weft_trace: int
    unit: int
    incarnation: int
    device: str


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One action that has ended. Times: ns of the machine's monotonic clock."""

    id: int
    kind: str
    model: str = ""
    planned_ns: int
    submitted_ns: int
    done_ns: int
    device_ns: int = 0
    bytes: int = 0
    ok: bool = True
    rows: int = 0
    prefill_rows: int = 0
    iterations: int = 0
    tokens: int = 0
    kv_tokens: int = 0
    granules: int = 0
    to: str = ""

    @property
    def begin_ns(self) -> int:
        """The best guess of when it began: its device time before its end, else when the executor
        had it."""
        if self.device_ns > 0:
            return max(self.done_ns - self.device_ns, min(self.planned_ns, self.done_ns))
        return min(self.submitted_ns, self.done_ns)


def parse_worker_trace(lines: Iterable[str], source: str = "trace") -> tuple[Header, list[Span]]:
    """The header and every span, by beginning. A last line cut short by the worker's death is
    passed over. Raises WeftError for anything else that is not a trace."""
    header: Header | None = None
    spans: list[Span] = []
    broken: str | None = None
    for number, line in enumerate(lines, 1):
        if broken is not None:
            raise WeftError(broken)
        try:
            if header is None:
                header = msgspec.json.decode(line, type=Header)
            else:
                spans.append(msgspec.json.decode(line, type=Span))
        except msgspec.DecodeError as error:
            broken = f"{source}: line {number} is not of a worker's trace: {error}"
    if header is None:
        raise WeftError(broken or f"{source}: empty; was the worker started with a trace folder?")
    return header, sorted(spans, key=lambda span: (span.begin_ns, span.id))


def read_worker_trace(path: Path) -> tuple[Header, list[Span]]:
    """As `parse_worker_trace`, from a file. Raises WeftError."""
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise WeftError(f"{path}: larger than {MAX_TRACE_BYTES >> 20} MiB; cut it first")
        with path.open(encoding="utf-8") as file:
            return parse_worker_trace(file, str(path))
    except OSError as error:
        raise WeftError(f"{path}: cannot be read: {error.strerror}") from None


def find_switch(spans: list[Span], margin_s: float = 0.02) -> tuple[int, int]:
    """(begin, end) in ns around the switch that moved most KV, from the load of the next model (or
    the last step of the one before, if that began earlier) to the end of the next one's first step,
    with a margin on both sides. A switch that loaded its model once is preferred to one that had to
    load it again. Raises WeftError if no model followed another after a load."""
    margin = round(margin_s * 1e9)
    best: tuple[tuple[bool, int], int, int] | None = None
    runs = [span for span in spans if span.kind == "Run" and span.ok]
    all_loads = [span for span in spans if span.kind == "Load" and span.ok]
    copies = [span for span in spans if span.kind == "CopyKv"]
    turn_began = runs[0].begin_ns if runs else 0
    for before, after in pairwise(runs):
        if before.model == after.model:
            continue
        loads = [
            span
            for span in all_loads
            if span.model == after.model and turn_began <= span.begin_ns < after.done_ns
        ]
        turn_began = after.begin_ns
        if not loads:
            continue
        begin, end = min(loads[0].begin_ns, before.begin_ns) - margin, after.done_ns + margin
        moved = sum(span.bytes for span in copies if span.done_ns > begin and span.begin_ns < end)
        score = (len(loads) == 1, moved)
        if best is None or score > best[0]:
            best = (score, begin, end)
    if best is None:
        raise WeftError("no model followed another after a load in this trace; no switch to draw")
    return best[1], best[2]

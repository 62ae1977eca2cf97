"""Reads the trace a worker writes (`weft.worker.trace` documents the format)."""

from collections.abc import Iterable
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


def find_switch(spans: list[Span], margin_s: float = 0.05) -> tuple[int, int]:
    """(begin, end) in ns around the busiest switch: the Load with most bytes parked or resumed
    near it, with a margin before and after. Raises WeftError where nothing was loaded."""
    margin = round(margin_s * 1e9)
    loads = [span for span in spans if span.kind == "Load" and span.ok]
    if not loads:
        raise WeftError("no model was loaded in this trace; there is no switch to draw")

    def moved(load: Span) -> int:
        low, high = load.begin_ns - margin, load.done_ns + margin
        near = (s for s in spans if s.kind == "CopyKv" and s.done_ns > low and s.begin_ns < high)
        return sum(span.bytes for span in near)

    best = max(loads, key=moved)
    return best.begin_ns - margin, best.done_ns + margin

"""Rows of a request trace and their mapping onto the models of a pool.

A trace says when requests came and how long prompt and answer were, never what was in them. To
replay one on another pool: `cut` some of it, `compress` its time, `scale_lengths` to the context
of the models, and `spread` it over them with a stated skew.
"""

import csv
import random
from collections.abc import Iterable, Sequence
from io import StringIO
from itertools import accumulate, islice
from typing import NoReturn

import msgspec

from weft.core.errors import WeftError

COLUMNS = ("timestamp", "model", "prompt_tokens", "output_tokens")
MAX_ROWS = 1_000_000
MAX_TOKENS = 10_000_000
MAX_SECONDS = 10 * 365 * 86400


class TraceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the trace has it. `service` is the traced system's own name for the target."""

    arrival_ns: int
    service: str
    prompt_tokens: int
    output_tokens: int


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A request to be sent to a model of the pool, `arrival_ns` after the replay began."""

    arrival_ns: int
    model: str
    prompt_tokens: int
    output_tokens: int


def parse_trace(text: str, *, source: str = "trace") -> tuple[TraceRow, ...]:
    """CSV with the columns timestamp (seconds), model, prompt_tokens, output_tokens; lines that
    begin with # are comments. Sorted by time. Raises WeftError with the line of the first fault."""
    lines = [(n, s) for n, s in enumerate(text.splitlines(), 1) if s and not s.startswith("#")]
    if not lines or tuple(next(csv.reader(StringIO(lines[0][1])))) != COLUMNS:
        raise WeftError(f"{source}: the first line must be {','.join(COLUMNS)}")
    if len(lines) - 1 > MAX_ROWS:
        raise WeftError(f"{source}: more than {MAX_ROWS} rows; replay a part of it")
    rows = [_parse_row(line, f"{source}: line {number}") for number, line in lines[1:]]
    return tuple(sorted(rows, key=lambda row: row.arrival_ns))


def _parse_row(line: str, where: str) -> TraceRow:
    def refuse(reason: str) -> NoReturn:
        raise WeftError(f"{where}: {reason}") from None

    cells = next(csv.reader(StringIO(line)))
    if len(cells) != len(COLUMNS):
        refuse(f"{len(cells)} columns instead of {len(COLUMNS)}")
    try:
        seconds, prompt, output = float(cells[0]), int(cells[2]), int(cells[3])
    except ValueError:
        refuse(f"not a number in {line[:80]!r}")
    if not 0 <= seconds <= MAX_SECONDS:
        refuse(f"timestamp {cells[0]} is outside 0 .. {MAX_SECONDS} s")
    if not (1 <= prompt <= MAX_TOKENS and 1 <= output <= MAX_TOKENS):
        refuse(f"token counts must lie in 1 .. {MAX_TOKENS}")
    return TraceRow(
        arrival_ns=round(seconds * 1e9),
        service=cells[1],
        prompt_tokens=prompt,
        output_tokens=output,
    )


def format_trace(rows: Iterable[TraceRow]) -> str:
    """The inverse of `parse_trace`, without comments; times to 0.1 ms."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        seconds = f"{row.arrival_ns / 1e9:.4f}"
        writer.writerow((seconds, row.service, row.prompt_tokens, row.output_tokens))
    return out.getvalue()


def cut(rows: Sequence[TraceRow], limit: int | None = None) -> tuple[TraceRow, ...]:
    """The first `limit` rows, their time starting at 0."""
    kept = tuple(islice(rows, limit))
    if not kept:
        return ()
    begin = kept[0].arrival_ns
    return tuple(msgspec.structs.replace(row, arrival_ns=row.arrival_ns - begin) for row in kept)


def compress(rows: Sequence[TraceRow], speed: float) -> tuple[TraceRow, ...]:
    """Time runs `speed` times as fast (below 1: slower). Raises WeftError unless speed > 0."""
    if not speed > 0:
        raise WeftError(f"speed is {speed}; it must be above 0")
    return tuple(
        msgspec.structs.replace(row, arrival_ns=round(row.arrival_ns / speed)) for row in rows
    )


def scale_lengths(
    rows: Sequence[TraceRow], context_tokens: int, *, output_share: float = 0.5
) -> tuple[TraceRow, ...]:
    """Shrink lengths so that every request fits a context.

    Prompts and outputs are each multiplied by one factor, at most 1, such that the longest prompt
    takes (1 - output_share) and the longest output output_share of the context; each keeps at
    least one token. Proportions between requests stay; those between prompt and output do not.
    """
    if not 0 < output_share < 1 or context_tokens < 2:
        raise WeftError("scaling needs a context of 2 tokens and an output share inside 0 .. 1")
    if not rows:
        return ()
    room_out = min(max(1, int(context_tokens * output_share)), context_tokens - 1)
    room_in = context_tokens - room_out
    longest_in = max(row.prompt_tokens for row in rows)
    longest_out = max(row.output_tokens for row in rows)
    return tuple(
        msgspec.structs.replace(
            row,
            prompt_tokens=_shrink(row.prompt_tokens, room_in, longest_in),
            output_tokens=_shrink(row.output_tokens, room_out, longest_out),
        )
        for row in rows
    )


def _shrink(tokens: int, room: int, longest: int) -> int:
    return tokens if longest <= room else max(1, tokens * room // longest)


def zipf_shares(num_models: int, skew: float) -> tuple[float, ...]:
    """Shares of the models, first the busiest: proportional to 1 / rank ** skew. 0 is uniform."""
    if num_models < 1 or not 0 <= skew <= 10:
        raise WeftError(f"{num_models} models with skew {skew}: need at least 1 and 0 .. 10")
    weights = [rank**-skew for rank in range(1, num_models + 1)]
    whole = sum(weights)
    return tuple(weight / whole for weight in weights)


def spread(
    rows: Sequence[TraceRow], models: Sequence[str], *, skew: float, seed: int
) -> tuple[Arrival, ...]:
    """Give each row to a model, drawn independently with `zipf_shares` in the order given. The
    traced service is ignored: a trace of two services becomes one of len(models)."""
    bounds = list(accumulate(zipf_shares(len(models), skew)))
    rng = random.Random(f"weft-spread-{seed}")
    arrivals = []
    for row in rows:
        point = rng.random()
        index = next((i for i, bound in enumerate(bounds) if point < bound), len(models) - 1)
        arrivals.append(
            Arrival(
                arrival_ns=row.arrival_ns,
                model=models[index],
                prompt_tokens=row.prompt_tokens,
                output_tokens=row.output_tokens,
            )
        )
    return tuple(arrivals)

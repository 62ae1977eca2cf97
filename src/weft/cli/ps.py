"""`weft ps`: the pool's view as a table."""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

import msgspec
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from weft.cli.units import size_text
from weft.core.errors import WeftError
from weft.core.unit import ModelStatus
from weft.hub.base import UnitView
from weft.server.status import StatusReply

PLAIN_WIDTH = 160
TIMEOUT_S = 10.0
MAX_REPLY_BYTES = 64 << 20

Rates = dict[tuple[int, str], float]
"""Tokens a second by unit and model."""


def fetch(url: str) -> StatusReply:
    """Raises WeftError."""
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise WeftError(f"{url!r} is no URL; write one such as http://127.0.0.1:8321")
    try:
        key = os.environ.get("WEFT_API_KEY", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(f"{base}/weft/status", headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            body = reply.read(MAX_REPLY_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise WeftError(
                f"{base} needs an operator's key: set WEFT_API_KEY to one with `operator: true`"
            ) from None
        raise WeftError(f"{base} answers {error.code} to /weft/status; is it weft?") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise WeftError(
            f"no server at {base} ({reason}); start one with `weft serve`, or give --url"
        ) from None
    try:
        return msgspec.json.decode(body, type=StatusReply)
    except msgspec.DecodeError as error:
        raise WeftError(f"{base} is not this version of weft: {error}") from None


def rates_between(old: StatusReply, new: StatusReply) -> Rates:
    """Output tokens a second of every model that both views show in the same incarnation."""
    before = {
        (unit.unit, unit.incarnation, model.name): (unit.status.at_ns, model.output_tokens)
        for unit in old.pool.units
        if unit.status is not None
        for model in unit.status.models
    }
    rates: Rates = {}
    for unit in new.pool.units:
        for model in unit.status.models if unit.status else ():
            known = before.get((unit.unit, unit.incarnation, model.name))
            if known is None or unit.status is None or unit.status.at_ns <= known[0]:
                continue
            span_s = (unit.status.at_ns - known[0]) * 1e-9
            rates[unit.unit, model.name] = (model.output_tokens - known[1]) / span_s
    return rates


def render(status: StatusReply, rates: Rates | None, *, plain: bool, width: int) -> Group:
    """Lines about the pool and its units, then a row per unit and model, with as many columns as
    `width` has room for."""
    table = _table(status, rates, _COLUMNS, plain=plain)
    columns = list(_COLUMNS)
    for spare in _SPARE_COLUMNS:
        if Measurement.get(_MEASURING, _MEASURING.options, table).maximum <= width:
            break
        columns.remove(spare)
        table = _table(status, rates, columns, plain=plain)
    return Group(*_heads(status), table, *_broken(status))


def _heads(status: StatusReply) -> Iterator[Text]:
    pool, health = status.pool, status.health
    state = "healthy" if health.healthy else f"STUCK for {health.since_progress_s:.0f} s"
    yield Text(
        f"weft {status.version}  {state}{'' if health.ready else ', not ready yet'}  "
        f"{pool.unfinished} unfinished  host store "
        f"{size_text(pool.host_store_used_bytes)} of {size_text(pool.host_store_bytes)}"
    )
    for unit in pool.units:
        yield Text(_unit_line(unit))


def _unit_line(unit: UnitView) -> str:
    line = f"unit {unit.unit}  {unit.device}  {'up' if unit.up else 'DOWN'}"
    if unit.restarts:
        line += f"  {unit.restarts} restarts"
    if unit.status is not None:
        status = unit.status
        used = status.num_granules - status.free_granules
        line += (
            f"  arena {used} of {status.num_granules} granules"
            f"  parked KV {size_text(status.host_used_bytes)} of {size_text(status.host_bytes)}"
            f"  copied {size_text(status.bytes_copied)}"
        )
    return line


_SPARE_COLUMNS = (
    "UNIT",
    "PAGES",
    "PROMPT TOK",
    "OUT",
    "OUTPUT TOK",
    "KV",
    "WEIGHTS",
    "IN",
    "PARKED",
)
"""What a narrow terminal goes without, first the first: a name cut short tells nobody anything."""
_COLUMNS = (
    "MODEL",
    "UNIT",
    "STATE",
    "TURN",
    "QUEUED",
    "RUNNING",
    "PARKED",
    "WEIGHTS",
    "KV",
    "PAGES",
    "IN",
    "OUT",
    "PROMPT TOK",
    "OUTPUT TOK",
    "TOK/S",
)


_MEASURING = Console(width=1000)


def _table(
    status: StatusReply, rates: Rates | None, columns: Sequence[str], *, plain: bool
) -> Table:
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in columns:
        right = name not in ("MODEL", "STATE", "TURN")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for unit in status.pool.units:
        for model in unit.status.models if unit.status else ():
            rate = None if rates is None else rates.get((unit.unit, model.name))
            style = "bold" if model.turn and not plain else None
            cells = dict(zip(_COLUMNS, _cells(unit.unit, model, rate), strict=True))
            table.add_row(*(cells[name] for name in columns), style=style)
    return table


def _cells(unit: int, model: ModelStatus, rate: float | None) -> list[str]:
    numbers = (
        model.queued,
        model.running,
        model.parked,
        model.weight_granules,
        model.kv_granules,
        model.kv_pages_used,
        model.switches_in,
        model.switches_out,
        model.prompt_tokens,
        model.output_tokens,
    )
    return [
        model.name,
        str(unit),
        model.state,
        "turn" if model.turn else "",
        *(str(number) for number in numbers),
        "-" if rate is None else f"{rate:.1f}",
    ]


def _broken(status: StatusReply) -> Iterator[Text]:
    for card in status.pool.models:
        if card.failed is not None:
            yield Text(f"{card.name} cannot be served: {card.failed}")
    for unit in status.pool.units:
        for model in unit.status.models if unit.status is not None else ():
            if model.reason is not None:
                yield Text(f"{model.name} cannot be served: {model.reason}")


def make_console() -> Console:
    """As wide as the table needs when the output is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def show(url: str) -> None:
    """Print the view once. Raises WeftError."""
    status = fetch(url)
    console = make_console()
    console.print(render(status, None, plain=not console.is_terminal, width=console.width))


def watch_status(url: str, interval_s: float) -> None:
    """Print it again and again until interrupted. Raises WeftError."""
    console = make_console()
    try:
        if console.is_terminal:
            with Live(console=console, screen=False) as live:
                for view in _views(url, interval_s, console):
                    live.update(view, refresh=True)
        else:
            for view in _views(url, interval_s, console):
                console.print(view)
                console.print()
    except KeyboardInterrupt:
        return


def _views(url: str, interval_s: float, console: Console) -> Iterator[Group]:
    old: StatusReply | None = None
    while True:
        new = fetch(url)
        rates = None if old is None else rates_between(old, new)
        yield render(new, rates, plain=not console.is_terminal, width=console.width)
        old = new
        time.sleep(interval_s)

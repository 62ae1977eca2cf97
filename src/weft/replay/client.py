"""One streamed request over HTTP, and what the endpoint tells of itself.

A fault of the server never raises: it becomes the record's error.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import msgspec

from weft.core.errors import WeftError
from weft.replay.records import Counter, ModelFacts, Piece, Planned, Record, spread_evenly

MAX_LINE_CHARS = 1 << 20


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How requests are sent."""

    url: str
    """Of the server, with or without /v1."""
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 600.0
    """A request that takes longer has failed."""
    extensions: bool = True
    """Send `ignore_eos` and ask for usage in every chunk; servers that only know OpenAI's fields
    refuse these."""
    api_key: str | None = None

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")


class _Text(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Text | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


class StreamFault(Exception):
    """What is wrong with an answer, in one line."""


class _Stream:
    """What one stream has brought so far."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.text_ns: list[int] = []
        """Events with text, for servers that count only at the end."""
        self.choice_ns: list[int] = []
        """Events with a choice, with text or without."""
        self.counted = 0
        self.usage: _Usage | None = None
        self.finish: str | None = None
        self.complete = False

    def feed(self, line: str, now_ns: int) -> None:
        """One line of server-sent events. Raises StreamFault."""
        if not line.startswith("data:"):
            return  # a comment that keeps the stream alive, or the blank line after an event
        data = line[5:].strip()
        if data == "[DONE]":
            self.complete = True
            return
        try:
            event = _decoder.decode(data)
        except msgspec.DecodeError as error:
            raise StreamFault(f"not an event: {error}: {data[:100]}") from None
        if event.error is not None:
            raise StreamFault(explain(event.error))
        for choice in event.choices:
            self.finish = choice.finish_reason or self.finish
            self.choice_ns.append(now_ns)
            if choice.text or (choice.delta and choice.delta.content):
                self.text_ns.append(now_ns)
        if event.usage is not None:
            self.usage = event.usage
            new = event.usage.completion_tokens - self.counted
            if event.choices and new > 0:
                self.pieces.append(Piece(now_ns, new))
                self.counted += new

    def result(self) -> tuple[Piece, ...]:
        """Tokens by event: as the server counted them, else the final total spread evenly."""
        if self.pieces:
            rest = self.usage.completion_tokens - self.counted if self.usage else 0
            last = [Piece(self.pieces[-1].at_ns, rest)] if rest > 0 else []
            return (*self.pieces, *last)
        times = self.text_ns or self.choice_ns
        return spread_evenly(times, self.usage.completion_tokens if self.usage else len(times))


def explain(error: Any) -> str:
    """OpenAI's error object, or whatever it is, as one line."""
    if isinstance(error, dict):
        inner = error.get("error", error)
        if isinstance(inner, dict):
            code = inner.get("code") or inner.get("type") or "error"
            return f"{code}: {inner.get('message', '')}"[:300]
    return str(error)[:300]


def make_body(planned: Planned, settings: Settings) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": planned.model,
        "prompt": planned.prompt,
        "max_tokens": planned.output_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed + planned.index,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.extensions:
        body["ignore_eos"] = True
        body["stream_options"]["continuous_usage_stats"] = True
    return body


def make_client(settings: Settings) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    return httpx.AsyncClient(
        base_url=settings.base,
        headers=headers,
        timeout=httpx.Timeout(settings.timeout_s, connect=30.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        trust_env=False,
    )


async def send(
    client: httpx.AsyncClient,
    planned: Planned,
    settings: Settings,
    now_ns: Callable[[], int],
    on_tokens: Callable[[int], None],
) -> Record:
    """Send one request and read its stream to the end. `now_ns` counts from the replay's begin;
    `on_tokens` is told of every event's tokens. Cancelled, it leaves a record that says so."""
    sent, stream, error = now_ns(), _Stream(), None
    try:
        async with asyncio.timeout(settings.timeout_s):
            async for line in _lines(client, make_body(planned, settings)):
                before = stream.counted or len(stream.text_ns)
                stream.feed(line, now_ns())
                on_tokens((stream.counted or len(stream.text_ns)) - before)
        error = _shortcoming(stream, planned, settings)
    except StreamFault as fault:
        error = str(fault)
    except TimeoutError:
        error = f"no end within {settings.timeout_s:g} s"
    except httpx.HTTPError as fault:
        error = f"{type(fault).__name__}: {fault}"
    except asyncio.CancelledError:
        error = "interrupted"
    return Record(
        index=planned.index,
        model=planned.model,
        arrival_ns=planned.arrival_ns,
        sent_ns=sent,
        end_ns=now_ns(),
        prompt_tokens=(stream.usage and stream.usage.prompt_tokens) or planned.prompt_tokens,
        asked_tokens=planned.output_tokens,
        pieces=stream.result(),
        finish=stream.finish,
        error=error,
    )


async def _lines(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[str]:
    """The lines of a streamed completion. Raises StreamFault for an HTTP error."""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raw = (await response.aread())[:MAX_LINE_CHARS]
            try:
                reason = explain(msgspec.json.decode(raw))
            except msgspec.DecodeError:
                reason = raw[:200].decode(errors="replace")
            raise StreamFault(f"{response.status_code} {reason}")
        async for line in response.aiter_lines():
            yield line


def _shortcoming(stream: _Stream, planned: Planned, settings: Settings) -> str | None:
    """Why a stream that ended without a word of complaint is a failure all the same."""
    if not stream.complete:
        return "the stream broke off"
    if stream.finish is None:
        return "the stream has no finish_reason"
    if stream.finish not in ("stop", "length"):
        return f"finished with {stream.finish!r}"
    got = sum(piece.tokens for piece in stream.result())
    if settings.extensions and got != planned.output_tokens:
        return f"{got} tokens came, {planned.output_tokens} were asked for"
    return None


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


class _Counts(msgspec.Struct):
    name: str
    switches_in: int = 0
    switches_out: int = 0


class _UnitStatus(msgspec.Struct):
    models: list[_Counts] = []


class _Unit(msgspec.Struct):
    status: _UnitStatus | None = None


class _StatusCard(msgspec.Struct):
    name: str
    max_context_tokens: int | None = None
    vocab_size: int | None = None
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None


class _PoolStatus(msgspec.Struct):
    models: list[_StatusCard] = []
    units: list[_Unit] = []


class _Status(msgspec.Struct):
    pool: _PoolStatus


async def fetch_models(client: httpx.AsyncClient) -> list[ModelFacts]:
    """Served models, in the server's order, with what /weft/status adds. Raises WeftError."""
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        cards = msgspec.json.decode(response.content, type=_Cards).data
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        raise WeftError(
            f"{client.base_url}: no list of models ({type(error).__name__}: {error}); "
            "is the server up, and is the URL right?"
        ) from None
    status = await _fetch_status(client)
    known = {card.name: card for card in status.models} if status else {}
    return [
        ModelFacts(
            name=card.id,
            max_context_tokens=more.max_context_tokens or card.max_model_len,
            vocab_size=more.vocab_size,
            ttft_slo_s=more.ttft_slo_s,
            tbt_slo_s=more.tbt_slo_s,
        )
        for card in cards
        for more in [known.get(card.id, _StatusCard(name=card.id))]
    ]


async def fetch_switches(client: httpx.AsyncClient) -> dict[str, Counter] | None:
    """Switches so far per model over all units; None if the server does not tell."""
    status = await _fetch_status(client)
    if status is None:
        return None
    totals: dict[str, Counter] = {}
    for unit in status.units:
        for counts in unit.status.models if unit.status else []:
            old = totals.get(counts.name, Counter())
            totals[counts.name] = Counter(
                switches_in=old.switches_in + counts.switches_in,
                switches_out=old.switches_out + counts.switches_out,
            )
    return totals


async def _fetch_status(client: httpx.AsyncClient) -> _PoolStatus | None:
    try:
        response = await client.get("/weft/status")
        if response.status_code != 200:
            return None
        return msgspec.json.decode(response.content, type=_Status).pool
    except (httpx.HTTPError, msgspec.DecodeError):
        return None  # another server, which has no such page

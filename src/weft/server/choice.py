"""One answer in the making: chunks of token ids from the hub become pieces of text."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import chain

import msgspec

from weft.core.errors import DRAINING, REQUEST_FAILED, ReplyError
from weft.core.ids import RequestId
from weft.core.request import TokenLogprobs
from weft.hub.base import Chunk, Hub, NewRequest
from weft.server.attainment import Deadlines
from weft.server.detokenize import Decode, Detokenizer, StopStrings
from weft.server.metrics import Metrics
from weft.slo.attainment import Slo


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """What one chunk of the hub became. The last one has `finish` or `error`."""

    text: str
    tokens: tuple[int, ...] = ()
    finish: str | None = None
    """"stop" or "length"."""
    error: ReplyError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `tokens`, where they were asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: tuple[bytes, ...] = ()


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(chain.from_iterable(piece.tokens for piece in pieces)),
        finish=pieces[-1].finish,
        logprobs=tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
        prompt_logprobs=tuple(chain.from_iterable(piece.prompt_logprobs for piece in pieces)),
        embedding=tuple(chain.from_iterable(piece.embedding for piece in pieces)),
    )


class Choice:
    """Pulls one hub request. A chunk is taken only when `next` is called, that is when the last
    piece was written to the client: whoever reads slowly leaves ids (never text, at most
    max_tokens of them) waiting in the hub."""

    def __init__(
        self,
        hub: Hub,
        request: NewRequest,
        decode: Decode,
        stops: tuple[str, ...],
        metrics: Metrics,
        *,
        index: int,
        arrival_s: float,
        slo: Slo,
        counts_prompt: bool = True,
        silent: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens the request. A silent one keeps what it draws for itself. Raises HubRefusal."""
        self.index = index
        self.counts_prompt = counts_prompt
        """The first choice of its prompt; the others do not count it in the usage."""
        self.cached_tokens = 0
        self.prompt_tokens = len(request.prompt)
        self.output_tokens = 0
        self.ttft_s: float | None = None
        self.outcome: str | None = None
        self.deadlines = Deadlines(arrival_s, slo)
        self._hub = hub
        self._model = request.model
        self._min_tokens = request.min_tokens
        self._silent = silent
        self._metrics = metrics
        self._clock = clock
        self._arrival_s = arrival_s
        self._last_s = arrival_s
        self._text = Detokenizer(decode, request.prompt)
        self._stops = StopStrings(stops)
        self._id: RequestId
        self._chunks: AsyncIterator[Chunk]
        self._id, self._chunks = hub.open(request)
        metrics.prompt_tokens.labels(self._model).inc(self.prompt_tokens)

    @property
    def done(self) -> bool:
        return self.outcome is not None

    async def next(self) -> Piece:
        """The next piece. Not to be called again after one with `finish` or `error`."""
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            lost = ReplyError(code=REQUEST_FAILED, message="the answer ended without a reason")
            chunk = Chunk(finish="error", error=lost)
        return self._piece(chunk)

    def _piece(self, chunk: Chunk) -> Piece:
        self.cached_tokens += chunk.cached_tokens or 0
        if self._silent:
            chunk = msgspec.structs.replace(chunk, tokens=(), logprobs=())
        parts: list[str] = []
        used = 0
        for token in chunk.tokens:
            used += 1
            parts.append(self._push(self._text.push(token), self.output_tokens + used))
            if self._stops.found is not None:
                break
        self._count(used)
        tokens = chunk.tokens[:used]
        if self._stops.found is None and chunk.finish in ("stop", "length"):
            parts.append(self._push(self._text.finish(), self.output_tokens))
            if self._stops.found is None:
                parts.append(self._stops.finish())
        piece = Piece(
            text="".join(parts),
            tokens=tokens,
            logprobs=chunk.logprobs[:used],
            prompt_logprobs=chunk.prompt_logprobs,
            embedding=chunk.embedding,
        )
        if self._stops.found is not None:
            self.outcome = "stop"
            if chunk.finish is None:
                self._hub.cancel(self._id)
            return msgspec.structs.replace(piece, finish="stop")
        if chunk.finish is None:
            return piece
        if chunk.finish in ("stop", "length"):
            self.outcome = "length" if self._silent else chunk.finish
            return msgspec.structs.replace(piece, finish=self.outcome)
        self.outcome = "error"
        error = chunk.error
        if chunk.finish == "cancelled":
            error = ReplyError(code=DRAINING, message="the request was cancelled by the server")
        elif error is None:
            error = ReplyError(code=REQUEST_FAILED, message="the request failed")
        return msgspec.structs.replace(piece, error=error)

    def _push(self, text: str, tokens_so_far: int) -> str:
        """Stop strings count from min_tokens on, as stop ids do."""
        return self._stops.push(text) if tokens_so_far >= self._min_tokens else text

    def _count(self, tokens: int) -> None:
        """A chunk of k tokens is one gap and k - 1 times nothing: that is how it is seen."""
        if not tokens:
            return
        now = self._clock()
        gaps = tokens
        if self.output_tokens == 0:
            self.ttft_s = now - self._arrival_s
            self._metrics.ttft.labels(self._model).observe(self.ttft_s)
            gaps -= 1
        tbt = self._metrics.tbt.labels(self._model)
        for i in range(gaps):
            tbt.observe(now - self._last_s if i == 0 and gaps == tokens else 0.0)
        self._last_s = now
        self.deadlines.came(tokens, now)
        self.output_tokens += tokens
        self._metrics.output_tokens.labels(self._model).inc(tokens)

    def abandon(self, outcome: str) -> None:
        """Nobody wants the rest: tell the hub. Idempotent, and without effect once done."""
        if self.outcome is None:
            self.outcome = outcome
            self._hub.cancel(self._id)

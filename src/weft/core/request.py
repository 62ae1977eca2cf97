"""A request as the hub records it and a unit runs it. Token ids only; text is the frontend's."""

from typing import Literal

import msgspec

from weft.core.ids import ModelName, RequestId

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is drawn. Noise is a function of (seed, output position, token id) alone.

    temperature 0 is greedy (ties to the lowest id). top_k 0 and top_p 1.0 mean no truncation.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked. Immutable; what was answered so far travels beside it (`Submit.emitted`)."""

    id: RequestId
    model: ModelName
    prompt: tuple[int, ...]
    """At least one token."""
    max_tokens: int
    min_tokens: int = 0
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the output besides the model's EOS ids; the stop token is not emitted."""
    ignore_eos: bool = False
    priority: int = 0
    """Lower runs earlier."""
    tenant: str = ""
    adapter: str | None = None
    arrival_ns: int = 0
    hold_deadline_ns: int | None = None
    """If the request has not begun by then it fails with 503."""
    reruns: int = 0
    """How often a worker died while this request was on it."""


class Extent(msgspec.Struct, frozen=True, order=True):
    """A byte range of the host store."""

    offset: int
    num_bytes: int


class ParkedKv(msgspec.Struct, frozen=True, kw_only=True):
    """KV of one request in the host store: page i of the request lies in extents, in order.

    `tokens` positions 0..tokens-1 are valid. The extents together hold ceil(tokens / page_tokens)
    whole pages, concatenated in extent order.
    """

    extents: tuple[Extent, ...]
    tokens: int

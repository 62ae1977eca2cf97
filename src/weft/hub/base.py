"""The contract between frontends and the hub. In one process: an object. Split: the same calls
over messages."""

from collections.abc import AsyncIterator
from typing import Protocol, runtime_checkable

import msgspec

from weft.core.errors import ReplyError
from weft.core.ids import RequestId
from weft.core.request import (
    FinishReason,
    Pooling,
    Sampling,
    SamplingDefaults,
    TokenLogprobs,
)
from weft.core.unit import UnitStatus


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a frontend asks for, already in token ids. The hub gives id, arrival and deadline."""

    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    priority: int = 0
    tenant: str = ""
    prompt_logprobs: int | None = None
    embed: Pooling | None = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Some more of an answer. The last one has `finish`; `error` only with finish "error"."""

    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    error: ReplyError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `tokens`, where they were asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: tuple[bytes, ...] = ()
    """See `core.actions.Emit`."""
    cached_tokens: int | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A served model as frontends need it."""

    name: str
    path: str
    """Folder with tokenizer.json, tokenizer_config.json, generation_config.json."""
    created_s: int
    max_context_tokens: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    ttft_slo_s: float
    tbt_slo_s: float
    base: str | None = None
    """The model under this adapter; requests to the adapter carry the adapter's own name."""
    aliases: tuple[str, ...] = ()
    """Other names for it in requests."""
    pooling: Pooling = "last"
    """How its embeddings are made."""
    tool_parser: str | None = None
    """How it writes function calls, where its chat template does not tell."""
    defaults: SamplingDefaults = SamplingDefaults()
    """For requests that do not say."""
    chat_template: str | None = None
    """Path of a file with a Jinja template instead of the checkpoint's own."""
    text_stamp: int = 0
    """Another one when tokenizer or template files have changed."""
    failed: str | None = None
    """Why the model cannot be served (a broken checkpoint); its requests get 503 model_failed."""


class UnitView(msgspec.Struct, frozen=True, kw_only=True):
    unit: int
    incarnation: int
    device: str
    up: bool
    restarts: int
    status: UnitStatus | None


class PoolView(msgspec.Struct, frozen=True, kw_only=True):
    """What `weft ps` and /metrics show."""

    models: tuple[ModelCard, ...]
    units: tuple[UnitView, ...]
    unfinished: int
    host_store_bytes: int
    host_store_used_bytes: int


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """healthy: nothing waits, or an action was done or a byte copied in the last `window_s`."""

    healthy: bool
    ready: bool
    """Every servable model has its image in the host store and a unit is up."""
    waiting: int
    since_progress_s: float


@runtime_checkable
class Unfetched(Protocol):
    """What the iterator of `Hub.open` also is, where answers are made ahead of their readers."""

    @property
    def unfetched(self) -> int:
        """Tokens that were made and not yet fetched."""
        ...


class Hub(Protocol):
    def models(self) -> tuple[ModelCard, ...]: ...

    def open(self, new: NewRequest) -> tuple[RequestId, AsyncIterator[Chunk]]:
        """Admit a request. Raises `HubRefusal` if it is refused at once (429, 404, 400, 503).
        The iterator ends after a chunk with `finish`."""
        ...

    def cancel(self, request: RequestId) -> None:
        """The client is gone. Idempotent; unknown ids are ignored."""
        ...

    def view(self) -> PoolView: ...

    def health(self) -> Health: ...


class HubRefusal(Exception):
    """A request was not admitted."""

    def __init__(self, error: ReplyError) -> None:
        super().__init__(f"{error.code}: {error.message}")
        self.error = error

"""POST /v1/embeddings: texts or ids become vectors of length one."""

import base64
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import msgspec
import numpy as np
from pydantic import Field

from weft.core.request import Pooling
from weft.hub.base import NewRequest
from weft.server import wire
from weft.server.body import unsupported
from weft.server.choice import Choice, Piece
from weft.server.errors import ApiError
from weft.server.fields import MAX_NAME_CHARS, MAX_PRIORITY, MAX_TOKENS, Inputs, Strict, whole
from weft.server.plan import (
    Asker,
    Plan,
    context_error,
    encode_entry,
    find_model,
    prompt_entries,
    tenant_of,
)

WINDOW = 32
"""Inputs of one request that are in the hub at once: a large batch leaves room for others."""


class EmbeddingRequest(Strict):
    """POST /v1/embeddings."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: whole(1, MAX_TOKENS) | None = None
    """Only the model's own number."""
    priority: whole(-MAX_PRIORITY, MAX_PRIORITY) | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)] | None = None


async def plan_embeddings(asker: Asker, request: EmbeddingRequest) -> Plan:
    """Raises ApiError."""
    card = find_model(asker.hub, request.model)
    text = await asker.texts.model(card)
    entries = prompt_entries(request.input)

    def prepare() -> list[tuple[int, ...]]:
        return [encode_entry(text, card, entry, "input") for entry in entries]

    prompts = await asker.texts.run(card.name, prepare)
    for prompt in prompts:
        if len(prompt) > card.max_context_tokens:
            raise context_error(card, len(prompt), 0)
    requests = tuple(
        NewRequest(
            model=card.name,
            prompt=prompt,
            max_tokens=0,
            embed=card.pooling,
            priority=request.priority or 0,
            tenant=tenant_of(asker, request.cache_salt),
        )
        for prompt in prompts
    )
    return Plan(
        card=card,
        requests=requests,
        decode=_no_text,
        writer=partial(
            EmbeddingWriter,
            card.name,
            card.pooling,
            as_base64=request.encoding_format == "base64",
            dimensions=request.dimensions,
        ),
        window=WINDOW,
    )


def _no_text(_: list[int]) -> str:
    return ""


def pooled(parts: Sequence[bytes], pooling: Pooling, prompt_tokens: int) -> np.ndarray:
    """float32 [H] of length one: the parts' sum, its mean where that is asked for, normalised. A
    vector of zeros stays one."""
    total = np.sum([np.frombuffer(part, "<f4") for part in parts], axis=0, dtype=np.float64)
    if pooling == "mean":
        total /= prompt_tokens
    norm = np.linalg.norm(total)
    return np.asarray(total / norm if norm > 0 else total, np.float32)


class EmbeddingWriter:
    """Whole answers only."""

    def __init__(
        self,
        model: str,
        pooling: Pooling,
        request_id: str,
        *,
        as_base64: bool,
        dimensions: int | None,
    ) -> None:
        self._model = model
        self._pooling = pooling
        self._as_base64 = as_base64
        self._dimensions = dimensions

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Piece]) -> bytes:
        """Raises ApiError 400 when other dimensions were asked for than there are."""
        entries = [
            {
                "object": "embedding",
                "index": choice.index,
                "embedding": self._vector(choice, piece),
            }
            for choice, piece in zip(choices, pieces, strict=True)
        ]
        used = wire.usage(choices)
        return msgspec.json.encode(
            {
                "object": "list",
                "model": self._model,
                "data": entries,
                "usage": {key: used[key] for key in ("prompt_tokens", "total_tokens")},
            }
        )

    def _vector(self, choice: Choice, piece: Piece) -> str | list[float]:
        vector = pooled(piece.embedding, self._pooling, choice.prompt_tokens)
        if self._dimensions not in (None, len(vector)):
            raise unsupported("dimensions", f"this model has {len(vector)}")
        if self._as_base64:
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        values: list[float] = vector.tolist()
        return values

    def opening(self) -> bytes:
        return b""

    def chunk(self, choice: Choice, piece: Piece, choices: Sequence[Choice]) -> bytes:
        raise NotImplementedError("embeddings are not streamed")

    def closing(self, choices: Sequence[Choice]) -> bytes:
        raise NotImplementedError("embeddings are not streamed")

    def failure(self, error: ApiError) -> bytes:
        return wire.event(error.body())

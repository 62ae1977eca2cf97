"""What the writers of all routes share: events as bytes, usage, the contract."""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from weft.server.choice import Choice, Piece
from weft.server.errors import ApiError

DONE = b"data: [DONE]\n\n"
HELD = b": weft: held while the model comes in\n\n"
WAITING = b": weft: waiting for its turn\n\n"


class Writer(Protocol):
    """Writes one HTTP answer in the form of its route."""

    def opening(self) -> bytes:
        """What a stream begins with, before there is any token."""
        ...

    def chunk(self, choice: Choice, piece: Piece, choices: Sequence[Choice]) -> bytes:
        """The events of one piece of a stream."""
        ...

    def closing(self, choices: Sequence[Choice]) -> bytes:
        """The end of a stream. All choices are done."""
        ...

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Piece]) -> bytes:
        """The body of an answer that is not streamed: one joined piece for every choice."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The last event of a stream that broke."""
        ...


def event(value: Any, name: str | None = None) -> bytes:
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """A prompt counts once, however many choices it has."""
    prompt = sum(choice.prompt_tokens for choice in choices if choice.counts_prompt)
    cached = sum(choice.cached_tokens for choice in choices if choice.counts_prompt)
    output = sum(choice.output_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }

"""The contract of residency."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from weft.core.ids import ModelName


class ResidentView(msgspec.Struct, frozen=True, kw_only=True):
    """A model that holds device memory and may be made to give it up."""

    model: ModelName
    pinned: bool
    has_work: bool
    last_used_ns: int
    granules: int
    keep_alive_s: float = -1
    """Its owner's wish, as `ModelSpec.keep_alive_s`."""
    idle_since_ns: int | None = None
    """When its last request ended; None while it has work or if it had none since it came."""


class Residency(Protocol):
    preload: bool
    """Load a model as soon as it is assigned."""
    evicts: bool
    """Whether resident models may be moved out at all."""

    def victims(self, residents: Sequence[ResidentView], now_ns: int) -> list[ModelName]:
        """Those that may be evicted, first to go first. Pinned ones are never among them."""
        ...

    def leaves_at_ns(self, view: ResidentView) -> int | None:
        """When this model leaves though nobody wants its room, if nothing happens before; None:
        never. Asked only while it is idle after a request: `idle_since_ns` is set."""
        ...

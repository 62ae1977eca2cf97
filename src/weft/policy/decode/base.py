"""The contract of decode sharing."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from weft.core.ids import ModelName


class TurnView(msgspec.Struct, frozen=True, kw_only=True):
    """A model that has unfinished requests."""

    model: ModelName
    weight: float
    resident: bool
    last_turn_end_ns: int
    """-1: never had a turn."""
    oldest_arrival_ns: int


class DecodeShare(Protocol):
    def next_turn(
        self, views: Sequence[TurnView], current: ModelName | None, now_ns: int
    ) -> ModelName | None:
        """Who follows `current` (never `current` itself); None if nobody else has work."""
        ...

    def quota_ns(self, view: TurnView) -> int:
        """How long a turn lasts while others wait. Alone, a model keeps the turn."""
        ...

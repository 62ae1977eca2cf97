"""The contract of prefill orders."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from weft.core.ids import RequestId


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A request with positions to compute before it can draw: queued, parked in the host store, or
    admitted and in the middle of its prefill."""

    request: RequestId
    arrival_ns: int
    priority: int
    parked: bool
    tokens: int
    """Positions still to compute."""


class PrefillOrder(Protocol):
    def order(self, waiting: Sequence[Waiting], now_ns: int) -> list[RequestId]:
        """All of `waiting`, first to run first. The scheduler admits from the front and stops at
        the first that does not fit, so that nobody is overtaken for ever."""
        ...

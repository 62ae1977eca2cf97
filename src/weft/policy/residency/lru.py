"""Least recently used goes first, idle models before busy ones; pinned ones stay."""

from collections.abc import Sequence

from weft.core.ids import ModelName
from weft.policy.residency.base import ResidentView


class Lru:
    preload = False
    evicts = True

    def victims(self, residents: Sequence[ResidentView], now_ns: int) -> list[ModelName]:
        free = [view for view in residents if not view.pinned]
        free.sort(key=lambda v: (v.has_work, v.last_used_ns, v.model))
        return [view.model for view in free]

"""Least recently used goes first, idle models before busy ones; pinned ones stay.

A model that its owner gave a time to live leaves when it was idle for so long (what `ttl` is to
llama-swap and `keep_alive` to Ollama). The time begins with the end of its last request: one that
was brought in without a request stays until it had one.
"""

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

    def leaves_at_ns(self, view: ResidentView) -> int | None:
        if view.pinned or view.has_work or view.idle_since_ns is None or view.keep_alive_s < 0:
            return None
        return view.idle_since_ns + round(view.keep_alive_s * 1e9)

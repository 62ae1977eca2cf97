"""Weighted round-robin turns with a time quota (after Aegaeon, SOSP'25, section 4.3; the quota
here is fixed a weight, not computed from slack)."""

from collections.abc import Sequence

from weft.core.ids import ModelName
from weft.policy.decode.base import TurnView


class WeightedRoundRobin:
    """The model whose last turn ended longest ago is next; ties go to the older request."""

    def __init__(self, turn_s: float) -> None:
        self._turn_ns = int(turn_s * 1e9)

    def next_turn(
        self, views: Sequence[TurnView], current: ModelName | None, now_ns: int
    ) -> ModelName | None:
        others = [view for view in views if view.model != current]
        if not others:
            return None
        best = min(others, key=lambda v: (v.last_turn_end_ns, v.oldest_arrival_ns, v.model))
        return best.model

    def quota_ns(self, view: TurnView) -> int:
        return int(self._turn_ns * view.weight)

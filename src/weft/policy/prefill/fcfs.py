"""First come, first served within a priority."""

from collections.abc import Sequence

from weft.core.ids import RequestId
from weft.policy.prefill.base import Waiting


class Fcfs:
    """By (priority, arrival, id). Parked requests arrived earlier, so they come back first."""

    def order(self, waiting: Sequence[Waiting], now_ns: int) -> list[RequestId]:
        ranked = sorted(waiting, key=lambda w: (w.priority, w.arrival_ns, w.request))
        return [w.request for w in ranked]

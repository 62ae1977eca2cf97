"""Every model stays where it is: what one process per model gives, as a baseline."""

from collections.abc import Sequence

from weft.core.ids import ModelName
from weft.policy.residency.base import ResidentView


class Dedicated:
    preload = True
    evicts = False

    def victims(self, residents: Sequence[ResidentView], now_ns: int) -> list[ModelName]:
        return []

    def leaves_at_ns(self, view: ResidentView) -> int | None:
        return None

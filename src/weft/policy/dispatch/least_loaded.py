"""Fewest unfinished requests first.

Source: the `load` dispatch of Llumnix (OSDI'24), with load counted in requests and reconciled at
dispatch time; ties go to the unit where the model already is (ServerlessLLM, OSDI'24: start where
the weights are), then to the one with fewer tokens to work off.
"""

from collections.abc import Sequence

from weft.core.request import Request
from weft.policy.dispatch.base import UnitLoad


class LeastLoaded:
    def choose(self, request: Request, units: Sequence[UnitLoad]) -> int:
        best = min(units, key=lambda u: (u.requests, not u.resident, u.tokens, u.unit))
        return best.unit

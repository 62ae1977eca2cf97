"""The question: a request waits in the pool; which of these units shall have it?"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from weft.core.request import Request


class UnitLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One unit that is up and may run the request's model.

    `requests` and `tokens` are the pool's own account, raised at the moment of dispatch: a report
    that is 100 ms old would send every request of a burst to the same unit. The rest is from the
    unit's last status.
    """

    unit: int
    requests: int
    """Unfinished requests placed here."""
    tokens: int
    """Their prompts and the output they may still make."""
    resident: bool
    """The request's model is resident here or on its way in."""
    free_granules: int


class Dispatch(Protocol):
    def choose(self, request: Request, units: Sequence[UnitLoad]) -> int:
        """The `unit` of one of `units` (never empty). A pure function of its arguments."""
        ...

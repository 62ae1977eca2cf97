"""The pool process of the campaign: as `pool_main`, but its hub gives requests priorities.

HTTP has no field for a priority yet, whereas hub, pool and scheduler carry one.
"""

import random
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from support.pool_main import main
from weft.core.ids import RequestId
from weft.hub.base import Chunk, NewRequest
from weft.hub.hub import PoolHub
from weft.node import app


class PrioritisingHub(PoolHub):
    """Every other request is more or less urgent than most."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._rng = random.Random(3)

    def open(self, new: NewRequest) -> tuple[RequestId, AsyncIterator[Chunk]]:
        priority = self._rng.choice([-1, 0, 0, 1])
        return super().open(msgspec.structs.replace(new, priority=priority))


if __name__ == "__main__":
    app.PoolHub = PrioritisingHub  # type: ignore[misc]
    main(sys.argv[1:])

"""What the pool knows of one unit: its incarnation, what is placed there, and when to restart.

    absent --StartWorker--> starting --UnitUp--> up --UnitLost--> absent (restart_ns says when)

`down` marks a unit whose last `max_failures` workers died without doing anything: nobody waits for
it any more, but it is tried again every `down_retry_s`.
"""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from weft.core.ids import ModelName, RequestId
from weft.core.unit import UnitStatus

Phase = Literal["absent", "starting", "up", "stopping"]

NS = 1_000_000_000


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The pool's bounds."""

    max_queue: int = 1024
    """Unfinished requests before new ones are refused."""
    max_model_queue: int | None = None
    """The same of one model, so that one crowd does not keep out the others. None: three quarters
    of `max_queue` where there are several models."""
    max_reruns: int = 2
    """Times in a row that a request may lose its worker in a step without a token in between."""
    max_reruns_total: int = 32
    """The same with tokens in between: bounds a request that kills its worker now and then."""
    max_failures: int = 5
    """Workers of a unit lost in a row without progress before it is declared down."""
    backoff_s: float = 0.5
    """Delay before the restart after the first such loss; doubles with each further one."""
    backoff_max_s: float = 30.0
    down_retry_s: float = 60.0
    silent_s: float = 120.0
    """A worker with requests that says nothing for so long is killed and restarted."""


@dataclass(slots=True)
class Unit:
    id: int
    incarnation: int = 0
    phase: Phase = "absent"
    restart_ns: int | None = None
    failures: int = 0
    progress: bool = False
    """This incarnation has done something (a token, a parked KV, an action)."""
    down: bool = False
    requests: dict[RequestId, None] = field(default_factory=dict)
    tokens: int = 0
    assigned: dict[ModelName, None] = field(default_factory=dict)
    leaving: dict[ModelName, None] = field(default_factory=dict)
    """Unassigned, but the unit may still read their images."""
    stepping: frozenset[RequestId] | None = None
    """As last told; None: this incarnation has not begun a step."""
    status: UnitStatus | None = None
    heard_ns: int = 0

    @property
    def up(self) -> bool:
        return self.phase == "up"

    def suspected(self, request: RequestId) -> bool:
        """Could this request, which is placed here, be why the worker died?"""
        return self.stepping is None or request in self.stepping

    def place(self, request: RequestId, tokens: int, now_ns: int) -> None:
        if not self.requests:
            self.heard_ns = now_ns
        self.requests[request] = None
        self.tokens += tokens

    def unplace(self, request: RequestId, tokens: int) -> None:
        del self.requests[request]
        self.tokens -= tokens

    @property
    def free_granules(self) -> int:
        return self.status.free_granules if self.status is not None else 0

    def resident(self, model: ModelName) -> bool:
        if self.status is None:
            return False
        return any(
            m.name == model and m.state in ("loading", "resident") for m in self.status.models
        )

    def begin(self) -> None:
        """A new incarnation is being started."""
        self.incarnation += 1
        self.phase = "starting"
        self.restart_ns = None
        self.progress = False
        self.status = None
        self.stepping = None

    def lose(self, limits: Limits, now_ns: int) -> None:
        """Its worker is gone: count, and say when the next one starts."""
        self.phase = "absent"
        self.assigned.clear()
        self.leaving.clear()
        self.failures = 0 if self.progress else self.failures + 1
        if self.failures >= limits.max_failures:
            self.down = True
            delay_s = limits.down_retry_s
        elif self.failures == 0:
            delay_s = 0.0
        else:
            delay_s = min(limits.backoff_s * 2.0 ** (self.failures - 1), limits.backoff_max_s)
        self.restart_ns = now_ns + round(delay_s * NS)

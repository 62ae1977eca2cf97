"""What the pool's scheduler asks for. The hub carries actions out in their order.

All `AssignTo`, `SubmitTo` and `CancelAt` of one decision for one unit reach that unit in one
instant: a new incarnation learns of every parked KV it inherits before it gives any host extent
away.
"""

import msgspec

from weft.core.errors import ReplyError
from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import FinishReason, ParkedKv, Request, TokenLogprobs


class _ToUnit(msgspec.Struct, frozen=True, kw_only=True):
    unit: int
    incarnation: int


class SubmitTo(_ToUnit, frozen=True, kw_only=True, tag=True):
    request: Request
    emitted: tuple[int, ...] = ()
    resume: ParkedKv | None = None


class CancelAt(_ToUnit, frozen=True, kw_only=True, tag=True):
    request: RequestId


class AssignTo(_ToUnit, frozen=True, kw_only=True, tag=True):
    model: ModelSpec


class UnassignFrom(_ToUnit, frozen=True, kw_only=True, tag=True):
    model: ModelName


class WarmAt(_ToUnit, frozen=True, kw_only=True, tag=True):
    model: ModelName


class UnloadAt(_ToUnit, frozen=True, kw_only=True, tag=True):
    model: ModelName


class ModelGone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nobody uses the removed model any more, neither a request nor a unit."""

    model: ModelName


class StartWorker(_ToUnit, frozen=True, kw_only=True, tag=True):
    """Answered by UnitUp or UnitLost of this incarnation."""


class StopWorker(_ToUnit, frozen=True, kw_only=True, tag=True):
    """Kill it; answered by UnitLost."""


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """More of an answer, for the client. Nothing follows the one with `finish`."""

    request: RequestId
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    error: ReplyError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: tuple[bytes, ...] = ()
    cached_tokens: int | None = None
    """These four as in `core.actions.Emit`."""


class Reject(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The request was not admitted and leaves no trace. In the decision of its NewRequest."""

    request: RequestId
    error: ReplyError


class WakeAt(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Send Woke at this time; replaces an earlier one."""

    at_ns: int


PoolAction = (
    SubmitTo
    | CancelAt
    | AssignTo
    | UnassignFrom
    | WarmAt
    | UnloadAt
    | ModelGone
    | StartWorker
    | StopWorker
    | Reply
    | Reject
    | WakeAt
)

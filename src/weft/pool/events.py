"""What the pool's scheduler is told. All events of one instant are handed over together.

Everything that comes from a unit carries the unit's incarnation; what a dead incarnation said
after `UnitLost` is ignored. `UnitLost` is told only when the worker process is gone and every
message it ever sent has been handed over: the journal and the parked KV are then exact.
"""

import msgspec

from weft.core.actions import Emit
from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import ParkedKv, Request
from weft.core.unit import UnitStatus


class NewRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A client asks. The hub gave id, arrival and hold deadline; ids ascend."""

    request: Request


class ClientGone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nobody waits for the answer any more; unknown ids are ignored."""

    request: RequestId


class ModelAdded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The pool serves this model; requests for it are held until it is ready."""

    spec: ModelSpec


class ModelChanged(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Other wishes (objectives, weight, pinned, time to live) for a model of the same sizes."""

    spec: ModelSpec


class ModelRemoved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """New requests for it are refused, those that were admitted finish; ends in `ModelGone`."""

    model: ModelName


class WarmModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An operator wants the model on a device, now or as soon as it is ready."""

    model: ModelName


class UnloadModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An operator wants the model off the devices."""

    model: ModelName


class ModelReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model's weight image is in the host store: units may load it."""

    model: ModelName


class ModelFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model can never be served (a broken checkpoint), whether it was added or not."""

    model: ModelName
    reason: str


class UnitAdded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The pool has one more unit; its worker is to be started."""

    unit: int


class _FromUnit(msgspec.Struct, frozen=True, kw_only=True):
    unit: int
    incarnation: int


class UnitUp(_FromUnit, frozen=True, kw_only=True, tag=True):
    """The worker said hello: it takes assignments and requests."""


class UnitLost(_FromUnit, frozen=True, kw_only=True, tag=True):
    """The worker process is gone, or could not be started."""

    cause: str


class Unbound(_FromUnit, frozen=True, kw_only=True, tag=True):
    """The unit has forgotten the model that was unassigned and reads its image no more."""

    model: ModelName


class Emitted(_FromUnit, frozen=True, kw_only=True, tag=True):
    emit: Emit


class KvParkedAt(_FromUnit, frozen=True, kw_only=True, tag=True):
    """This KV lies in the unit's region of its node's host store and outlives the worker."""

    request: RequestId
    kv: ParkedKv


class KvGoneAt(_FromUnit, frozen=True, kw_only=True, tag=True):
    request: RequestId


class Stepping(_FromUnit, frozen=True, kw_only=True, tag=True):
    """The requests with a row in the steps now in flight: the suspects if the worker dies.

    Sent before a step with a request not in the last report is submitted; a request whose rows
    have ended may still be named.
    """

    requests: tuple[RequestId, ...]


class UnitReport(_FromUnit, frozen=True, kw_only=True, tag=True):
    status: UnitStatus


class DrainPool(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Refuse new requests from now on, finish what is here."""


class Woke(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The time asked for by WakeAt has come."""


PoolEvent = (
    NewRequest
    | ClientGone
    | ModelAdded
    | ModelChanged
    | ModelRemoved
    | WarmModel
    | UnloadModel
    | ModelReady
    | ModelFailed
    | UnitAdded
    | UnitUp
    | UnitLost
    | Unbound
    | Emitted
    | KvParkedAt
    | KvGoneAt
    | Stepping
    | UnitReport
    | DrainPool
    | Woke
)

"""What a unit's scheduler is told. All events of one instant are handed over together."""

import msgspec

from weft.core.ids import ActionId, ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import ParkedKv, Request, TokenLogprobs


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request for this unit. `emitted` was already sent to the client: continue after it."""

    request: Request
    emitted: tuple[int, ...] = ()
    resume: ParkedKv | None = None


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop a request; unknown or finished ones are ignored. Ends in Emit(finish="cancelled")."""

    request: RequestId


class Assign(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From now on this unit may load the model (again: replaces pinned, weight and SLO)."""

    model: ModelSpec


class Unassign(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Take no more requests for it; drop it when those in hand are finished."""

    model: ModelName


class Pin(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    model: ModelName
    pinned: bool


class Warm(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Bring the model's weights in as soon as that takes no room from a model with work."""

    model: ModelName


class Unload(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Take the model's weights off the device as soon as it has no work. It stays assigned: its
    next request brings it back. A pinned model stays."""

    model: ModelName


class BindFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The executor cannot take the model that was just assigned; another try may follow when it
    is assigned again."""

    model: ModelName
    reason: str


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Finish what is here, refuse new requests."""


class ReportStatus(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer with a Status notice."""


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Iterations of a Run that have ended. `last` ends the action.

    tokens[i][j] is the token drawn by row j in the i-th iteration of this report; rows that do not
    sample have -1, and so has one whose grammar has come to its end (its output is complete).
    """

    action: ActionId
    iterations: int
    last: bool
    tokens: tuple[tuple[int, ...], ...]
    token_ns: tuple[int, ...] = ()
    device_ns: int = 0
    logprobs: tuple[tuple[TokenLogprobs | None, ...], ...] = ()
    """Like `tokens`; empty where no row asked for any."""
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    """Per row, for its `targets`; empty where no row has any."""
    embeddings: tuple[bytes | None, ...] = ()
    """Per row, little-endian float32; empty where no row asked for any."""
    errors: tuple[str | None, ...] = ()
    """Per row, "code: message" (as `Emit.error`) where its request must end: a grammar that cannot
    be used, say. Empty where none has one."""


class CopyDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A Load or CopyKv ended; the bytes are where they should be."""

    action: ActionId
    num_bytes: int
    device_ns: int = 0


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    action: ActionId


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The action had no effect that anyone may rely on; the ledger rolls back.

    An action whose `after` (or `follow`) failed fails too, with cause "dependency".
    """

    action: ActionId
    cause: str
    retryable: bool = True


class Woke(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The time asked for by WakeAt has come."""


UnitEvent = (
    Submit
    | Cancel
    | Assign
    | Unassign
    | Pin
    | Warm
    | Unload
    | BindFailed
    | Drain
    | ReportStatus
    | StepDone
    | CopyDone
    | Done
    | Failed
    | Woke
)

"""What a unit's scheduler asks for.

`UnitAction`s go to the executor, run asynchronously and end in exactly one Done or Failed (a Run
ends in StepDone(last=True), a Load or CopyKv in CopyDone). `after` names the actions that must
have taken effect first; the executor never reorders across it and never chooses memory.
`UnitNotice`s go to the hub or the worker loop, take effect when delivered and are never answered.
The worker delivers the notices of one decision before it submits that decision's actions: a host
extent is given away only after the hub was told that its old content is gone.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from weft.core.ids import ActionId, GranuleId, ModelName, PageId, RequestId, SlotId
from weft.core.request import (
    Extent,
    FinishReason,
    ParkedKv,
    Pooling,
    Sampling,
    TokenLogprobs,
)
from weft.core.unit import UnitStatus


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One request's part of a step: positions start .. start + num_tokens - 1.

    Idempotent: running it again writes the same positions.
    """

    request: RequestId
    slot: SlotId
    start: int
    num_tokens: int
    input: tuple[int, ...] | None
    """num_tokens ids; None (decode only): the token last sampled in this slot, on the device."""
    sample: Sampling | None
    """Draw a token after the last position; None for a prefill chunk that is not the last."""
    output_index: int = 0
    """Position of the drawn token in the output: counter of the random numbers."""
    stop_ids: tuple[int, ...] = ()
    """A drawn token among these finishes the row (ends a repeat)."""
    min_remaining: int = 0
    """Drawn tokens before stop_ids count: iteration i ignores (and masks) them while i < this."""
    first_page: int = 0
    append_pages: tuple[PageId, ...] = ()
    """Written into the slot's page table at first_page before the step; entries before are kept."""
    adapter: ModelName | None = None
    outputs: tuple[int, ...] = ()
    """With `sample.stepwise` only: every token drawn before, all output_index of them."""
    prompt_ids: tuple[int, ...] = ()
    """With a repetition penalty only: the distinct ids of the prompt, ascending."""
    targets: tuple[int, ...] = ()
    """With prompt log probabilities only: the ids that follow the row's first len(targets) tokens
    in the prompt."""
    target_logprobs: int = 0
    """How many most probable ids to report at each of `targets`."""
    embed: Pooling | None = None
    """"last": report the final hidden state (after the last norm) of the row's last token; "mean":
    the sum of those of all its tokens. float32."""


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One forward pass of one model. The record of these is the plan log (promise 2)."""

    model: ModelName
    rows: tuple[Row, ...]
    repeat: int = 1
    """Do it up to this often (decode rows only): each iteration advances every row by one token
    and feeds it the token just drawn. Stops after the first iteration known to have finished a row
    or after an Interrupt; iterations already launched count, and finished rows in them are void."""


def finishes(plan: StepPlan, iteration: int, tokens: Sequence[int]) -> bool:
    """Whether a row drew one of its stop ids in this iteration: a repeat ends here.

    tokens[j] is what row j drew (-1: nothing).
    """
    return any(
        iteration >= row.min_remaining and token in row.stop_ids
        for row, token in zip(plan.rows, tokens, strict=True)
    )


class _Action(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    id: ActionId
    after: tuple[ActionId, ...] = ()


class Run(_Action, frozen=True, kw_only=True, tag=True):
    lane: int = 0
    plan: StepPlan
    follow: ActionId | None = None
    """Id of a Load of this model in flight: wait for it layer by layer. Not in `after`."""


class Load(_Action, frozen=True, kw_only=True, tag=True):
    """Map `granules` under the model's weight range, in order, and copy its image in."""

    model: ModelName
    granules: tuple[GranuleId, ...]


class Drop(_Action, frozen=True, kw_only=True, tag=True):
    """Unmap the model's weight range."""

    model: ModelName
    granules: tuple[GranuleId, ...]


class MapKv(_Action, frozen=True, kw_only=True, tag=True):
    """Map granules[i] at the model's virtual KV granule at[i]."""

    model: ModelName
    at: tuple[int, ...]
    granules: tuple[GranuleId, ...]


class UnmapKv(_Action, frozen=True, kw_only=True, tag=True):
    model: ModelName
    at: tuple[int, ...]
    granules: tuple[GranuleId, ...]


class CopyKv(_Action, frozen=True, kw_only=True, tag=True):
    """Copy whole pages between device pages and host extents (concatenated, page by page)."""

    model: ModelName
    request: RequestId
    pages: tuple[PageId, ...]
    extents: tuple[Extent, ...]
    tokens: int
    to: Literal["host", "device"]


class Interrupt(_Action, frozen=True, kw_only=True, tag=True):
    """Ask a repeated Run to stop after the iterations in flight. Done at once."""

    target: ActionId


UnitAction = Run | Load | Drop | MapKv | UnmapKv | CopyKv | Interrupt


class Emit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Tokens of a request for its client, in order, never revoked. The last one has `finish`."""

    request: RequestId
    tokens: tuple[int, ...]
    finish: FinishReason | None = None
    error: str | None = None
    """With finish "error": a code of `core.errors` and a message, as "code: message"."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `tokens`, where they were asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """In the first Emit, where they were asked for: positions 1 .. of the prompt."""
    embedding: tuple[bytes, ...] = ()
    """In the last Emit of an embedding: little-endian float32 vectors whose sum is the pooled
    state (for "mean" divide by the prompt's length)."""
    cached_tokens: int | None = None
    """In the first Emit: prompt tokens whose KV was found instead of computed."""


class KvParked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The host store holds this KV; a new incarnation may resume from it."""

    request: RequestId
    kv: ParkedKv


class KvGone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget the KvParked of this request: its extents are about to be reused."""

    request: RequestId


class WakeAt(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Send Woke at this time. A later WakeAt replaces an earlier one."""

    at_ns: int


class WeightsMoved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A model's weights began to come, came, left, or cannot come: for the log."""

    model: ModelName
    state: Literal["loading", "resident", "absent", "failed"]
    cause: str
    """Why, in a word or two (`sched.residency`); for "failed" the whole reason."""
    num_bytes: int = 0
    duration_ns: int = 0
    """Since the load or drop was ordered."""


class Status(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    status: UnitStatus


UnitNotice = Emit | KvParked | KvGone | WakeAt | WeightsMoved | Status

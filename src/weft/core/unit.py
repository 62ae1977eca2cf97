"""A unit: a fixed group of devices with one scheduler. And what it reports about itself."""

from typing import Literal

import msgspec

from weft.core.ids import ModelName


class UnitSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The fixed facts a unit's ledger accounts with. Measured at start, then never changed."""

    granule_bytes: int
    num_granules: int
    host_offset: int = 0
    """Where this unit's region for parked KV begins in the node's host store."""
    host_bytes: int
    """Size of that region; 0 means that nothing can be parked."""
    host_chunk_bytes: int = 1 << 30
    """No extent crosses a multiple of this (copies may not cross separately registered chunks)."""
    num_slots: int = 256
    """Requests that can hold device state at once."""
    depth: int = 2
    """Steps in flight per lane: 1 = no overlap, 2 = overlap."""
    max_rows: int = 64
    """Rows of one step."""
    max_step_tokens: int = 512
    """Tokens of one step: decode rows and prefill chunks together."""
    max_repeat: int = 16
    """Upper bound of Run.repeat; 1 switches it off."""
    lanes: int = 1
    prefix_cache: bool = True
    """KV of finished requests is kept for others that begin with the same tokens, in room that
    nobody else wants."""


ModelState = Literal["absent", "loading", "resident", "dropping", "failed"]


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model in a unit, for the pool, `weft ps` and the metrics. Counts since the unit began."""

    name: ModelName
    state: ModelState
    weight_granules: int
    kv_granules: int
    kv_pages_used: int
    queued: int
    running: int
    parked: int
    turn: bool
    switches_in: int
    switches_out: int
    prompt_tokens: int
    output_tokens: int
    prefix_hit_tokens: int = 0
    """Positions of requests whose KV was found in the prefix cache instead of computed."""
    kv_pages_cached: int = 0
    """Pages that the prefix cache keeps and nobody uses; counted in no other figure."""
    host_pages_cached: int = 0
    """Pages of the prefix cache in the host store; their room counts as unused."""
    reason: str | None = None
    """Why its state is failed."""
    loads_by: dict[str, int] = {}
    """`switches_in` by cause (`sched.residency`)."""
    drops_by: dict[str, int] = {}
    """`switches_out` by cause."""
    load_ns: int = 0
    """Time of all its loads, each from the order to the last byte."""
    load_bytes: int = 0
    """Weights that came in."""
    begun: int = 0
    """Requests that have begun: their first step was planned."""
    queue_wait_ns: int = 0
    """From their arrival to that, together."""
    preemptions: int = 0
    """Times a running request had to give its device memory up."""
    parks: int = 0
    """Of these, the ones whose KV was copied to the host (the others compute it again)."""


class UnitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A unit's summary: what the pool dispatches on and people look at."""

    at_ns: int
    models: tuple[ModelStatus, ...]
    free_granules: int
    num_granules: int
    host_used_bytes: int
    host_bytes: int
    host_cached_bytes: int = 0
    """What the prefix cache keeps there, in room that counts as unused."""
    actions_done: int
    """Progress: actions ended since the unit began."""
    bytes_copied: int
    """Progress: bytes moved by loads and KV copies since the unit began."""
    waiting: int
    """Requests that are not finished."""
    progress: int = 0
    """Progress within actions: parts of loads and host memory made ready. Any unit of count."""

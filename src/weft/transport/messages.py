"""The messages between the hub and its workers. Everything after `Configure` is tagged with the
incarnation; the side that hears a stale one drops it."""

from typing import Literal

import msgspec

from weft.core.actions import UnitNotice
from weft.core.events import UnitEvent
from weft.core.ids import ModelName, RequestId
from weft.core.model import AdapterShape, Architecture, ModelSpec
from weft.core.unit import UnitSpec
from weft.engine.base import ImageRef


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to know to become a unit. The sizes it measures come back in Hello."""

    unit: int
    incarnation: int
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_memory_bytes: int | None = None
    host_store_bytes: int
    """Size of the memfd."""
    host_offset: int
    """This unit's region for parked KV."""
    host_bytes: int
    depth: int = 2
    max_rows: int = 64
    max_step_tokens: int = 512
    max_repeat: int = 16
    prefix_cache: bool = True
    cpu_threads: int | None = None
    policy: str = "weft"
    turn_s: float | None = None
    trace_dir: str | None = None
    """Write a trace and the plan log of this incarnation there (`weft.worker.trace`)."""
    check: bool = False
    """Verify checksums of parked pages and images, and compare ledger and arena when idle."""


class Configure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Hub to worker, the first message."""

    config: WorkerConfig


class BindModel(msgspec.Struct, frozen=True, kw_only=True):
    """What the executor must know of a model; the scheduler's side is an Assign event."""

    model: ModelSpec
    arch: Architecture
    """Of a LoRA adapter: its base's."""
    image: ImageRef
    adapter: AdapterShape | None = None
    """What a LoRA adapter touches; None for a model of its own."""


class UnitEvents(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Hub to worker: bind these, then hand over these events."""

    incarnation: int
    bind: tuple[BindModel, ...] = ()
    events: tuple[UnitEvent, ...] = ()
    more: bool = False
    """The next message belongs to the same instant: handle both together."""


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Hub to worker: free the device and exit."""


HubMessage = Configure | UnitEvents | Shutdown


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to hub, the first message: the arena is there, the sizes are measured."""

    incarnation: int
    device: str
    """Such as "cpu (8 threads)" or "NVIDIA H200"."""
    spec: UnitSpec
    pins_host: bool = True
    """The host store is registered with a device: what was registered must not be punched."""


class Unbound(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to hub: nothing here reads the weight images of these unassigned models any more."""

    incarnation: int
    models: tuple[ModelName, ...]


class UnitNotices(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to hub: the notices of one decision, before its actions are submitted."""

    incarnation: int
    notices: tuple[UnitNotice, ...]


class StepRequests(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to hub: the requests with rows in the steps in flight (`weft.pool.events.Stepping`).
    Sent before a step with a request not in the last such message is submitted."""

    incarnation: int
    requests: tuple[RequestId, ...]


class WorkerFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Worker to hub: why it is about to exit, in one line."""

    incarnation: int
    reason: str
    refused: bool = False
    """The configuration cannot work on this machine; a new worker would say the same."""


WorkerMessage = Hello | UnitNotices | Unbound | StepRequests | WorkerFailed

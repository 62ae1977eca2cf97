"""The contract between the worker loop and an executor.

One executor a unit. `submit` and `poll` are called by one thread, the worker loop, and never
block on the device. Everything the executor needs for a model is given once by `bind`.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from weft.core.actions import UnitAction
from weft.core.events import UnitEvent
from weft.core.ids import ModelName
from weft.core.model import AdapterShape, Architecture, ModelSpec


class ImageRef(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model's packed weight image lies in the node's host store."""

    key: str
    """Content address; models with equal keys share the host bytes."""
    offset: int
    num_bytes: int
    tokenizer: str | None = None
    """Path of the model's tokenizer.json, for grammars; read when the first one comes."""


class Executor(Protocol):
    """Executes actions. Every submitted action ends in exactly one Done or Failed event
    (StepDone(last=True), CopyDone, Done or Failed), also after `close` has begun."""

    def bind(
        self,
        model: ModelSpec,
        arch: Architecture,
        image: ImageRef,
        adapter: AdapterShape | None = None,
    ) -> None:
        """Make the model known and reserve its address ranges. Before any action naming it. For a
        LoRA adapter `arch` is its base's and `adapter` says what it touches."""
        ...

    def unbind(self, model: ModelName) -> None:
        """Give the address ranges back. Legal only when no action naming it is in flight and
        nothing of it is mapped."""
        ...

    def submit(self, action: UnitAction) -> None:
        """Take the action; it starts when everything in `after` has taken effect."""
        ...

    def progress(self) -> int:
        """Rises while something long goes on: parts of loads that are there, host memory made
        ready. What it counts is the executor's own business."""
        ...

    def poll(self) -> Sequence[UnitEvent]:
        """Ends since the last call, in the order they happened; empty at once if none."""
        ...

    def wait_fd(self) -> int:
        """A file descriptor that is readable when `poll` may have something."""
        ...

    def check_integrity(self, *, mapped: dict[str, tuple[int, ...]]) -> None:
        """Compare the arena with the ledger: `mapped` gives, per "model/weights" and "model/kv",
        the physical granule at every virtual granule (-1 where none). Raises AssertionError."""
        ...

    def close(self) -> None:
        """Stop threads, free the device."""
        ...

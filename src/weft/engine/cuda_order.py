"""What is queued on which stream, and how others order themselves behind it."""

import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from weft.core.actions import CopyKv, Load, Run
from weft.core.ids import ActionId
from weft.engine.cuda_device import Mark, Stream
from weft.engine.runner import Runner
from weft.engine.step import Step


class Marks:
    """Where issued actions end. Thread-safe by the atomicity of single dict operations."""

    def __init__(self) -> None:
        self._marks: dict[ActionId, tuple[Stream, Mark]] = {}

    def put(self, action: ActionId, stream: Stream, mark: Mark) -> None:
        self._marks[action] = (stream, mark)

    def remove(self, action: ActionId) -> None:
        """The action has ended: nobody need wait for it any more. Unknown ones are ignored."""
        self._marks.pop(action, None)

    def wait(self, after: Sequence[ActionId]) -> None:
        """Wait on the host until the device has passed these actions."""
        for other in after:
            if (where := self._marks.get(other)) is not None:
                where[1].synchronize()

    def queue_behind(self, after: Sequence[ActionId], stream: Stream) -> None:
        """Let `stream` wait for these actions, where they are not on it anyway."""
        for other in after:
            where = self._marks.get(other)
            if where is not None and where[0] is not stream:
                stream.wait(where[1])


@dataclass
class Channel:
    """A stream, and what was queued on it and has not ended."""

    stream: Stream
    marks: "queue.SimpleQueue[Mark | None]" = field(default_factory=queue.SimpleQueue)
    """For the thread that watches this stream."""

    def record(self) -> Mark:
        """A mark that wakes the worker loop when the device passes it."""
        mark = self.stream.record()
        self.marks.put(mark)
        return mark


@dataclass
class Copy:
    """A Load or CopyKv on its stream."""

    action: Load | CopyKv
    num_bytes: int
    begin: Mark
    end: Mark
    check: Callable[[], None] | None
    """Compares checksums once the copy has ended; raises ChecksumError."""


@dataclass
class CopyChannel(Channel):
    actions: "queue.SimpleQueue[Load | CopyKv | None]" = field(default_factory=queue.SimpleQueue)
    flying: deque[Copy] = field(default_factory=deque)


@dataclass
class Running:
    """A Run with iterations on its lane's stream."""

    action: Run
    step: Step
    marks: deque[tuple[Mark, Mark]] = field(default_factory=deque)
    """Begin and end of the iterations in flight."""
    completed: int = 0
    issued: bool = False
    """No further iteration will be launched."""


@dataclass
class Lane(Channel):
    runner: Runner = field(kw_only=True)
    ready: deque[Run] = field(default_factory=deque)
    running: list[Running] = field(default_factory=list)

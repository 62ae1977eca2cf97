"""The host side every executor shares: what is in flight, what may start, what has ended.

Thread-safe. No torch. The executor gives `dispatch`, which puts an action that may start into a
queue of its own; and calls `end` exactly once for each action that was dispatched.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from weft.core.actions import Interrupt, Load, Run, UnitAction
from weft.core.events import CopyDone, Done, Failed, StepDone, UnitEvent
from weft.core.ids import ActionId
from weft.engine.deps import Dependencies, LaneOrder, Released

DEPENDENCY = "dependency"
CLOSED = "closed"


class DependencyFailed(RuntimeError):
    """The Load that a Run follows failed."""


class ExecutorClosed(RuntimeError):
    """Given up because the executor closes."""


class LoadProgress:
    """How far a Load has come, extent by extent in load order. One writer, any number of readers.

    A mark may travel with every extent (on CUDA: the event recorded behind its copies).
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._marks: list[Any] = []
        self._failed = False

    def advance(self, mark: Any = None) -> None:
        """The next extent is there (or will be, behind `mark`)."""
        with self._condition:
            self._marks.append(mark)
            self._condition.notify_all()

    def fail(self) -> None:
        with self._condition:
            self._failed = True
            self._condition.notify_all()

    @property
    def extents(self) -> int:
        """Extents that are there."""
        return len(self._marks)

    def passed(self) -> int:
        """Extents that are there, those whose mark the device has yet to pass left out."""
        with self._condition:
            return sum(mark is None or bool(mark.query()) for mark in self._marks)

    def wait(self, extent: int) -> Any:
        """Block until this extent is there and return its mark. Raises DependencyFailed."""
        with self._condition:
            self._condition.wait_for(lambda: self._failed or len(self._marks) > extent)
            if self._failed:
                raise DependencyFailed("the load that this step follows failed")
            return self._marks[extent]


class ActionBook:
    """Dependencies, lane order, load progress, interrupts and the queue of events.

    `dispatch(action)` is called with the book's lock held: it must not block or call back.
    """

    def __init__(self, dispatch: Callable[[UnitAction], None], lanes: int = 1) -> None:
        self._dispatch = dispatch
        self._lock = threading.Lock()
        self._deps = Dependencies()
        self._lanes = [LaneOrder() for _ in range(lanes)]
        self._actions: dict[ActionId, UnitAction] = {}
        self._loads: dict[ActionId, LoadProgress] = {}
        self._parts_of_ended_loads = 0
        self._issued: set[ActionId] = set()
        self._interrupted: set[ActionId] = set()
        self._events: deque[UnitEvent] = deque()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False

    def submit(self, action: UnitAction) -> None:
        """Take an action; dispatches it, now or later, or ends it.

        Raises ValueError for what only a bug can ask: an id used twice, an `after` never
        submitted, a lane that does not exist.
        """
        with self._lock:
            if self._closing:
                self._emit(Failed(action=action.id, cause=CLOSED))
                return
            if isinstance(action, Interrupt):
                self._interrupt(action)
                return
            if isinstance(action, Run) and not 0 <= action.lane < len(self._lanes):
                raise ValueError(f"lane {action.lane} does not exist")
            follow = action.follow if isinstance(action, Run) else None
            released = self._deps.add(action.id, action.after, follow)
            self._actions[action.id] = action
            if isinstance(action, Load):
                self._loads[action.id] = LoadProgress()
            if isinstance(action, Run):
                self._lanes[action.lane].add(action.id)
            self._release(released)

    def report(self, event: StepDone) -> None:
        """Iterations of a Run that goes on."""
        with self._lock:
            self._emit(event)

    def issue(self, action: ActionId) -> None:
        """A dispatched action is queued on a device's streams, and whoever comes after orders
        itself behind it there: let go what waits for it. Its `end` comes later."""
        with self._lock:
            self._issued.add(action)
            self._release(self._deps.finish(action, ok=True))

    def end(self, event: StepDone | CopyDone | Done | Failed) -> None:
        """The end of a dispatched action, and of all that waited for it if it failed."""
        with self._lock:
            ok = not isinstance(event, Failed)
            self._forget(event.action, ok)
            self._emit(event)
            if event.action in self._issued:
                self._issued.remove(event.action)
                if not ok:
                    self._deps.fail_late(event.action)
            else:
                self._release(self._deps.finish(event.action, ok=ok))

    def interrupted(self, action: ActionId) -> bool:
        """Whether a Run should stop repeating: an Interrupt named it, or the executor closes."""
        return self._closing or action in self._interrupted

    def following(self, run: Run) -> LoadProgress | None:
        """The Load that `run` follows, if it is still in flight. Raises DependencyFailed."""
        if run.follow is None:
            return None
        with self._lock:
            if self._deps.has_failed(run.follow):
                raise DependencyFailed("the load that this step follows failed")
            return self._loads.get(run.follow)

    def load_parts(self) -> int:
        """Extents that loads have brought so far, since the beginning."""
        with self._lock:
            in_flight = sum(progress.passed() for progress in self._loads.values())
            return self._parts_of_ended_loads + in_flight

    def progress(self, load: ActionId) -> LoadProgress:
        """Of a dispatched Load."""
        with self._lock:
            return self._loads[load]

    def names_model(self, model: str) -> bool:
        """Whether an action in flight names the model."""
        with self._lock:
            return any(model in _models_of(action) for action in self._actions.values())

    def any_in_flight(self, actions: Iterable[ActionId]) -> bool:
        """Whether any of these has not ended yet."""
        with self._lock:
            return any(action in self._actions for action in actions)

    @property
    def in_flight(self) -> int:
        with self._lock:
            return len(self._actions)

    @property
    def closing(self) -> bool:
        return self._closing

    def poll(self) -> Sequence[UnitEvent]:
        with self._lock:
            if self._fd >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._fd)
            events = tuple(self._events)
            self._events.clear()
        return events

    def wait_fd(self) -> int:
        return self._fd

    def wake(self) -> None:
        """Make the descriptor readable: `poll` may find something. Any thread, also from inside
        `dispatch`; not after `end_close`."""
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    def drain(self) -> Sequence[UnitEvent]:
        """Like `poll`, but the descriptor stays as it is: nothing that woke it is lost."""
        with self._lock:
            events = tuple(self._events)
            self._events.clear()
        return events

    def begin_close(self) -> None:
        """Fail everything that has not started; what runs should end soon (`interrupted`)."""
        with self._lock:
            self._closing = True
            self._release(Released(failed=self._deps.abandon()), CLOSED)

    def end_close(self) -> None:
        """After the last `end`. `poll` still gives what was not read."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

    def _interrupt(self, action: Interrupt) -> None:
        self._deps.add(action.id, ())
        if self._deps.is_unfinished(action.target):
            self._interrupted.add(action.target)
        self._emit(Done(action=action.id))
        self._release(self._deps.finish(action.id, ok=True))

    def _release(self, released: Released, cause: str = DEPENDENCY) -> None:
        let_go: list[int] = []
        for action_id in released.failed:
            action = self._actions[ActionId(action_id)]
            self._forget(ActionId(action_id), ok=False)
            self._emit(Failed(action=ActionId(action_id), cause=cause))
            if isinstance(action, Run):
                let_go.extend(self._lanes[action.lane].failed(action_id))
        for action_id in released.ready:
            action = self._actions[ActionId(action_id)]
            if isinstance(action, Run):
                let_go.extend(self._lanes[action.lane].ready(action_id))
            else:
                self._dispatch(action)
        for action_id in let_go:
            self._dispatch(self._actions[ActionId(action_id)])

    def _forget(self, action: ActionId, ok: bool) -> None:
        del self._actions[action]
        self._interrupted.discard(action)
        progress = self._loads.pop(action, None)
        if progress is None:
            return
        self._parts_of_ended_loads += progress.extents
        if not ok:
            progress.fail()

    def _emit(self, event: UnitEvent) -> None:
        self._events.append(event)
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)


def _models_of(action: UnitAction) -> set[str | None]:
    """With adapters."""
    if isinstance(action, Interrupt):
        return set()
    if isinstance(action, Run):
        return {action.plan.model, *(row.adapter for row in action.plan.rows)}
    return {action.model}

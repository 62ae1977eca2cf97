"""Which action may start when. Pure: ids only, no torch, no threads (callers hold a lock).

An action is added once, finished once, and in between handed out as ready at most once. `after`
and `follow` name actions added earlier, so the order of adding is a topological order and nothing
can wait in a circle.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_FAILED_REMEMBERED = 1 << 16


@dataclass(frozen=True)
class Released:
    """What the end of an action set free, each in the order of adding."""

    ready: tuple[int, ...] = ()
    """May start now."""
    failed: tuple[int, ...] = ()
    """Waited, directly or not, on the action that failed: never start, already finished here."""


@dataclass
class _Waiting:
    missing: set[int]
    follow: int | None


@dataclass
class Dependencies:
    """Counts what every unfinished action still waits for.

    `follow` (a Run beside the Load of its model) delays nothing; but a follower that still waits
    when the followed action fails, fails too. A follower that was handed out already must watch
    the followed action itself.
    """

    _waiting: dict[int, _Waiting] = field(default_factory=dict)
    _started: set[int] = field(default_factory=set)
    _dependents: dict[int, list[int]] = field(default_factory=dict)
    _failed: dict[int, None] = field(default_factory=dict)
    _highest: int = -1

    def add(self, action: int, after: Iterable[int], follow: int | None = None) -> Released:
        """Make an action known. Ids in `after` that have ended count as done.

        Returns the action itself as ready or as failed, or nothing while it waits. Raises
        ValueError for an id used twice or an `after` that was never added (a bug of the caller).
        """
        if action in self._waiting or action in self._started or action in self._failed:
            raise ValueError(f"action {action} was submitted twice")
        named = set(after)
        for other in (*named, *(() if follow is None else (follow,))):
            if other > self._highest and not self.is_unfinished(other):
                raise ValueError(f"action {action} waits for {other}, which was never submitted")
        self._highest = max(self._highest, action)
        if any(a in self._failed for a in named) or follow in self._failed:
            self._remember_failure(action)
            return Released(failed=(action,))
        missing = {a for a in named if self.is_unfinished(a)}
        following = follow if follow is not None and self.is_unfinished(follow) else None
        if not missing:
            self._started.add(action)
            return Released(ready=(action,))
        self._waiting[action] = _Waiting(missing, following)
        for other in missing | ({following} if following is not None else set()):
            self._dependents.setdefault(other, []).append(action)
        return Released()

    def finish(self, action: int, *, ok: bool) -> Released:
        """End an action that was handed out as ready. Raises KeyError for any other."""
        self._started.remove(action)
        if not ok:
            self._remember_failure(action)
        ready: list[int] = []
        failed: list[int] = []
        ended = [action]
        while ended:
            gone = ended.pop()
            bad = gone in self._failed
            for dependent in self._dependents.pop(gone, ()):
                entry = self._waiting.get(dependent)
                if entry is None:
                    continue
                if bad:
                    del self._waiting[dependent]
                    self._remember_failure(dependent)
                    failed.append(dependent)
                    ended.append(dependent)
                    continue
                entry.missing.discard(gone)
                if not entry.missing:
                    del self._waiting[dependent]
                    self._started.add(dependent)
                    ready.append(dependent)
        return Released(ready=tuple(sorted(ready)), failed=tuple(sorted(failed)))

    def fail_late(self, action: int) -> None:
        """An action that was finished as good turned out bad: what is added after it fails."""
        self._remember_failure(action)

    def is_unfinished(self, action: int) -> bool:
        return action in self._waiting or action in self._started

    def has_failed(self, action: int) -> bool:
        """Only the last `MAX_FAILED_REMEMBERED` failures are known."""
        return action in self._failed

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._started)

    def waiting(self) -> tuple[int, ...]:
        """Actions not handed out yet, in the order of adding."""
        return tuple(self._waiting)

    def abandon(self) -> tuple[int, ...]:
        """Fail everything that still waits (shutdown). Started actions are left to finish."""
        gone = tuple(self._waiting)
        self._waiting.clear()
        self._dependents.clear()
        for action in gone:
            self._remember_failure(action)
        return gone

    def _remember_failure(self, action: int) -> None:
        self._failed[action] = None
        if len(self._failed) > MAX_FAILED_REMEMBERED:
            del self._failed[next(iter(self._failed))]


@dataclass
class LaneOrder:
    """A lane runs its steps in the order they were submitted, as a device stream does.

    Steps become ready in any order; one is let go when all before it were let go or failed. No
    circle can form: what a step waits for was submitted before it, and so was every earlier step.
    """

    _queue: deque[int] = field(default_factory=deque)
    _ready: set[int] = field(default_factory=set)
    _gone: set[int] = field(default_factory=set)

    def add(self, action: int) -> None:
        self._queue.append(action)

    def ready(self, action: int) -> tuple[int, ...]:
        """The step may start as far as its dependencies go. Returns the steps to start now."""
        self._ready.add(action)
        return self._let_go()

    def failed(self, action: int) -> tuple[int, ...]:
        """The step will never start. Returns the steps that waited behind it only."""
        self._gone.add(action)
        return self._let_go()

    def _let_go(self) -> tuple[int, ...]:
        out: list[int] = []
        while self._queue:
            head = self._queue[0]
            if head in self._gone:
                self._gone.remove(head)
            elif head in self._ready:
                self._ready.remove(head)
                out.append(head)
            else:
                break
            self._queue.popleft()
        return tuple(out)

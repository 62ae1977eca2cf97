"""Works out `after`: the actions in flight that a new action must follow.

Read after write, write after read, write after write, over named resources. Only actions in flight
count; a finished one orders nothing any more.
"""

from collections.abc import Hashable, Iterable

from weft.core.ids import ActionId

Resource = Hashable
"""("kv", request): the pages and the slot of a request. ("w", model): its weights on the device.
("kg", model, i): virtual KV granule i. ("x", request): its extents in the host store."""


class Hazards:
    """Readers and last writer of each resource among the actions in flight."""

    def __init__(self) -> None:
        self._writer: dict[Resource, ActionId] = {}
        self._readers: dict[Resource, set[ActionId]] = {}
        self._touched: dict[ActionId, tuple[tuple[Resource, ...], tuple[Resource, ...]]] = {}

    def plan(
        self,
        action: ActionId,
        *,
        reads: Iterable[Resource] = (),
        writes: Iterable[Resource] = (),
        except_for: ActionId | None = None,
    ) -> tuple[ActionId, ...]:
        """Register `action` and return what it must follow, ascending.

        `except_for` is left out of the answer: a Run that follows a Load layer by layer.
        """
        if action in self._touched:
            raise ValueError(f"action {action} is already in flight")
        read_keys, write_keys = tuple(dict.fromkeys(reads)), tuple(dict.fromkeys(writes))
        after: set[ActionId] = set()
        for key in read_keys:
            if (writer := self._writer.get(key)) is not None:
                after.add(writer)
        for key in write_keys:
            if (writer := self._writer.get(key)) is not None:
                after.add(writer)
            if (readers := self._readers.get(key)) is not None:
                after |= readers
        for key in read_keys:
            self._readers.setdefault(key, set()).add(action)
        for key in write_keys:
            # Earlier readers stay listed: they are in flight, and busy() must see them.
            self._writer[key] = action
        self._touched[action] = (read_keys, write_keys)
        after.discard(action)
        if except_for is not None:
            after.discard(except_for)
        return tuple(sorted(after))

    def done(self, action: ActionId) -> None:
        """Forget an action that ended. Raises KeyError if it is not in flight."""
        read_keys, write_keys = self._touched.pop(action)
        for key in read_keys:
            readers = self._readers[key]
            readers.discard(action)
            if not readers:
                del self._readers[key]
        for key in write_keys:
            if self._writer.get(key) == action:
                del self._writer[key]

    def busy(self, key: Resource) -> bool:
        """Whether an action in flight names the resource. A writer that a later writer has
        overtaken in this book is still covered: the later one follows it."""
        return key in self._writer or key in self._readers

    @property
    def in_flight(self) -> int:
        return len(self._touched)

    def check_integrity(self) -> None:
        for key, writer in self._writer.items():
            assert writer in self._touched, f"{key}: writer {writer} is not in flight"
        for key, readers in self._readers.items():
            assert readers, f"{key}: empty reader set"
            assert readers <= self._touched.keys(), f"{key}: readers not in flight"

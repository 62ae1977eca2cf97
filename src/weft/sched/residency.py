"""Which weights are here, why they came and why they leave: wishes, times to live, and accounts.

Causes of a load: "request" (work waits for it), "pinned", "preload", "asked" (an operator). Of a
drop: "room" (another model needs it), "keep_alive" (idle for too long), "asked", "removed" (no
longer assigned), "failed".
"""

from collections.abc import Collection, Iterator
from typing import Literal

from weft.core.actions import WeightsMoved
from weft.core.ids import ModelName
from weft.policy.residency.base import Residency, ResidentView
from weft.sched import adapters
from weft.sched.book import Book, ModelEntry


class Residents:
    """What the policy is shown of the models that hold memory, and the wishes that come without
    a request. Plans nothing itself: `Mover` does."""

    def __init__(self, book: Book, policy: Residency) -> None:
        self._book = book
        self._policy = policy

    def views(self) -> list[ResidentView]:
        """Models that hold device memory and are not on their way out."""
        return [
            self._view(name, entry)
            for name, entry in self._book.models.items()
            if not entry.leaving and self._book.memory(name).held_granules
        ]

    def _view(self, name: ModelName, entry: ModelEntry) -> ResidentView:
        return ResidentView(
            model=name,
            pinned=entry.spec.pinned,
            has_work=adapters.used(entry),
            last_used_ns=entry.last_used_ns,
            granules=self._book.memory(name).held_granules,
            keep_alive_s=entry.spec.keep_alive_s,
            idle_since_ns=entry.idle_since_ns,
        )

    # -- wishes ---------------------------------------------------------------------------------

    def warm(self, entry: ModelEntry) -> None:
        """An operator wants it here."""
        entry.unload = False
        if self._book.memory(entry.spec.name).state in ("absent", "dropping") or entry.leaving:
            entry.wish = "asked"

    def unload(self, entry: ModelEntry) -> None:
        """An operator wants it gone."""
        entry.wish = None
        here = self._book.memory(entry.spec.name).state in ("resident", "loading")
        entry.unload = here and not entry.spec.pinned

    def busy(self) -> Collection[ModelName]:
        """Models that nobody is sent away for without a request."""
        models = self._book.models.items()
        return {name for name, entry in models if adapters.used(entry)}

    def to_come(self) -> Iterator[ModelEntry]:
        """Models wished for, in the order of assignment. A wish for what is here or on its way is
        fulfilled, one for what has failed or leaves the unit is void."""
        for entry in list(self._book.models.values()):
            if entry.wish is None:
                continue
            state = self._book.memory(entry.spec.name).state
            fulfilled = state in ("resident", "loading") and not entry.leaving
            if fulfilled or entry.failed or entry.unassigned:
                entry.wish = None
            elif not adapters.used(entry):
                yield entry

    def could_free(self, keep: Collection[ModelName]) -> int:
        """Granules that are free, that idle models could give, or that hold nothing but what the
        prefix cache keeps."""
        views = self.views()
        idle = [view for view in views if view.model not in keep]
        allowed = self._policy.victims(idle, self._book.now_ns) if self._policy.evicts else []
        return self._book.ledger.free_granules + sum(
            view.granules
            if view.model in set(allowed)
            else len(self._book.memory(view.model).kv.empty_granules())
            for view in views
        )

    def to_leave(self) -> list[ModelName]:
        """Idle models whose time is up or that an operator sent away."""
        return [
            name
            for name, entry in self._resident()
            if (entry.unload and not adapters.used(entry)) or self._is_due(name, entry)
        ]

    def _resident(self) -> Iterator[tuple[ModelName, ModelEntry]]:
        """Models that may leave without being in anybody's way: looked through in every round, so
        only these are shown to the policy."""
        for name, entry in self._book.models.items():
            if entry.leaving or (entry.idle_since_ns is None and not entry.unload):
                continue
            if self._book.memory(name).state == "resident":
                yield name, entry

    def why_leaves(self, entry: ModelEntry) -> str:
        return "asked" if entry.unload else "keep_alive"

    def _leaves_at_ns(self, name: ModelName, entry: ModelEntry) -> int | None:
        if entry.idle_since_ns is None:
            return None
        return self._policy.leaves_at_ns(self._view(name, entry))

    def _is_due(self, name: ModelName, entry: ModelEntry) -> bool:
        at_ns = self._leaves_at_ns(name, entry)
        return at_ns is not None and at_ns <= self._book.now_ns

    def next_ns(self) -> int | None:
        """When the next idle model's time is up."""
        times = [self._leaves_at_ns(name, entry) for name, entry in self._resident()]
        return min((t for t in times if t is not None and t > self._book.now_ns), default=None)

    # -- accounts -------------------------------------------------------------------------------

    def load_ordered(self, entry: ModelEntry, cause: str) -> None:
        entry.load_cause, entry.ordered_ns = cause, self._book.now_ns
        entry.wish, entry.idle_since_ns = None, None
        self._tell(entry, "loading", cause)

    def came(self, entry: ModelEntry, num_bytes: int) -> None:
        cause, took_ns = entry.load_cause, self._book.now_ns - entry.ordered_ns
        entry.switches_in += 1
        entry.loads_by[cause] = entry.loads_by.get(cause, 0) + 1
        entry.load_ns += took_ns
        entry.load_bytes += num_bytes
        self._tell(entry, "resident", cause, num_bytes, took_ns)

    def left(self, entry: ModelEntry) -> None:
        cause, took_ns = entry.leave_cause, self._book.now_ns - entry.ordered_ns
        entry.switches_out += 1
        entry.drops_by[cause] = entry.drops_by.get(cause, 0) + 1
        entry.unload = False
        self._tell(entry, "absent", cause, entry.spec.weight_bytes, took_ns)

    def cannot_come(self, entry: ModelEntry) -> None:
        self._tell(entry, "failed", entry.failed or "")

    def _tell(
        self,
        entry: ModelEntry,
        state: Literal["loading", "resident", "absent", "failed"],
        cause: str,
        num_bytes: int = 0,
        took_ns: int = 0,
    ) -> None:
        self._book.notices.append(
            WeightsMoved(
                model=entry.spec.name,
                state=state,
                cause=cause,
                num_bytes=num_bytes,
                duration_ns=took_ns,
            )
        )

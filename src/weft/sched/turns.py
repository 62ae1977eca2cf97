"""Turns: which model the lane serves now, who is next, and when the turn passes."""

from weft.core.ids import ModelName
from weft.policy.decode.base import TurnView
from weft.policy.presets import Preset
from weft.sched.book import Book, ModelEntry


class Turns:
    """One turn at a time (one lane). The clock of a turn starts with its first step."""

    def __init__(self, book: Book, preset: Preset) -> None:
        self._book = book
        self._preset = preset
        self.current: ModelName | None = None
        self.next: ModelName | None = None
        """Who should be made ready while the current one runs."""
        self.started_ns: int | None = None
        self._quota_ns = 0
        self._draws_before = 0

    def _view(self, entry: ModelEntry) -> TurnView:
        return TurnView(
            model=entry.spec.name,
            weight=entry.spec.weight,
            resident=self._book.memory(entry.spec.name).state == "resident",
            last_turn_end_ns=entry.last_turn_end_ns,
            oldest_arrival_ns=min(
                (s.request.arrival_ns for s in entry.members.values()), default=0
            ),
        )

    def choose_next(self) -> None:
        """Ask the policy who follows. A choice stands until it had its turn or lost its work, so
        that what was loaded for it is used."""
        entry = self._book.models.get(self.next) if self.next is not None else None
        if entry is not None and entry.members and self.next != self.current:
            return
        views = [self._view(entry) for entry in self._book.busy_models()]
        self.next = self._preset.decode.next_turn(views, self.current, self._book.now_ns)

    @property
    def has_work(self) -> bool:
        entry = self._book.models.get(self.current) if self.current is not None else None
        return entry is not None and bool(entry.members)

    def end_ns(self) -> int | None:
        """When the current turn has used its quota; None if it has not begun."""
        if self.current not in self._book.models or self.started_ns is None:
            return None
        return self.started_ns + self._quota_ns

    @property
    def expired(self) -> bool:
        """Time is up, somebody waits, and the turn has drawn a token. Without the last, models
        whose KV cannot be parked could throw each other out for ever before any gets to draw; so a
        long prefill may hold the turn past its quota."""
        end = self.end_ns()
        if self.next is None or self.current is None or end is None or self._book.now_ns < end:
            return False
        return self._book.models[self.current].draws > self._draws_before

    @property
    def over(self) -> bool:
        """The current model has nothing to do, or its time is up and somebody waits."""
        return not self.has_work or self.expired

    def try_pass(self) -> bool:
        """Give the turn to `next` if it is over and `next` can use it. A model whose load is in
        flight gets it only when the lane would be idle otherwise."""
        if self.next is None or not self.over:
            return False
        entry = self._book.models[self.next]
        state = self._book.memory(self.next).state
        current = self._book.models.get(self.current) if self.current is not None else None
        current_can_run = (
            current is not None
            and bool(current.members)
            and current.leaving is None
            and self._book.memory(current.spec.name).state == "resident"
        )
        ready = state == "resident" or (state == "loading" and not current_can_run)
        if entry.leaving is not None or not ready:
            return False
        if current is not None:
            current.last_turn_end_ns = self._book.now_ns
        self.current, self.next, self.started_ns = self.next, None, None
        self._quota_ns = self._preset.decode.quota_ns(self._view(entry))
        self._draws_before = entry.draws
        self.choose_next()
        return True

    def step_planned(self) -> None:
        if self.started_ns is None:
            self.started_ns = self._book.now_ns

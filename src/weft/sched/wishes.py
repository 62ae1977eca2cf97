"""Weights that come and go without a request: pinned, preloaded, asked for, idle for too long."""

from weft.policy.presets import Preset
from weft.sched.book import Book, ModelEntry
from weft.sched.moves import Mover


class Wishes:
    """Asks the mover for what `Residents` says is wished."""

    def __init__(self, book: Book, mover: Mover, preset: Preset) -> None:
        self._book = book
        self._mover = mover
        self._preset = preset

    def preload(self) -> None:
        """Pinned models, and all where the policy says so, come in while there is room."""
        for entry in self._book.models.values():
            if not (entry.spec.pinned or self._preset.residency.preload):
                continue
            granules = self._book.memory(entry.spec.name).weight_granules
            if self._mover.loadable(entry) and self._fits(granules, entry):
                self._mover.load(entry, "pinned" if entry.spec.pinned else "preload")

    def _fits(self, granules: int, entry: ModelEntry) -> bool:
        """Whether there is room now. Granules that nobody uses are fetched for it."""
        if granules <= self._book.ledger.free_granules:
            return True
        everybody = self._book.models.keys()
        room = self._mover.residents.could_free(everybody) + self._mover.coming_granules()
        return granules <= room and self._mover.make_room(entry.spec.name, granules, everybody)

    def follow(self) -> None:
        """Weights come and go without a request: what was asked for, what was idle for too long.
        For moments in which nobody with work waits for room."""
        for name in self._mover.residents.to_leave():
            self._mover.send_away(
                name, "all", self._mover.residents.why_leaves(self._book.models[name])
            )
        for entry in self._mover.residents.to_come():
            need = self._book.memory(entry.spec.name).weight_granules
            keep = self._mover.residents.busy()
            if not self._mover.loadable(entry):
                continue
            if entry.wish == "preload" and not self._fits(need, entry):
                continue
            if self._mover.residents.could_free(keep) + self._mover.coming_granules() < need:
                continue
            if not self._mover.make_room(entry.spec.name, need, keep):
                return  # one after the other: two would take the same room
            self._mover.load(entry, entry.wish or "asked")

"""What must hold of a Book between decisions. For tests, and for workers in checking mode."""

from collections import Counter

from weft.core.ids import ModelName
from weft.sched import adapters
from weft.sched.book import Book, RequestState


def check_book(book: Book) -> None:
    """Every page and slot is held by whom the ledger says; counters agree with the actions in
    flight. Raises AssertionError."""
    book.ledger.check_integrity()
    for entry in book.models.values():
        if entry.spec.base is not None:
            assert not entry.members and not book.memory(entry.spec.name).kv.granules
        riders = [s for s in book.requests.values() if s.request.adapter == entry.spec.name]
        assert list(entry.riders.values()) == [s for s in riders if s.phase != "finished"]
    assert book.over == {s.id for s in book.requests.values() if s.phase == "finished"}
    pages: dict[ModelName, list[int]] = {name: [] for name in book.models}
    slots: list[int] = []
    for state in book.requests.values():
        pages[state.request.model] += state.pages
        slots += [] if state.slot is None else [state.slot]
        _check_request(book, state)
    for action, parts in book.saves.items():
        pages[book.moves[action].model] += [page for _, page, _ in parts]
    for name, held in pages.items():
        assert Counter(held) == book.memory(name).kv.live, f"{name}: pages leaked"
    assert len(slots) == len(set(slots)) and set(slots) == book.ledger.slots_taken
    parked = [s.parked for s in book.requests.values() if s.parked is not None]
    held_bytes = sum(e.num_bytes for kv in parked for e in kv.extents)
    used = book.ledger.extents.num_bytes - book.ledger.extents.free_bytes
    used -= book.ledger.shelf.held_bytes
    assert held_bytes <= used <= held_bytes + 4096 * sum(len(kv.extents) for kv in parked)
    in_flight = len(book.steps) + len(book.moves)
    assert book.ledger.hazards.in_flight == in_flight, "an action was forgotten"


def _check_request(book: Book, state: RequestState) -> None:
    steps = [step for step in book.steps.values() if state in step.states]
    assert state.runs_in_flight == len(steps)
    draws = sum(
        step.run.plan.repeat - step.seen
        for step in steps
        if step.run.plan.rows[step.states.index(state)].sample is not None
    )
    assert state.draws_in_flight == draws, f"draws {state.draws_in_flight} != {draws}"
    assert len(set(state.pages)) == len(state.pages), "a page is in two places"
    _check_shared(book, state)
    if state.phase in ("queued", "parked"):
        assert not state.pages and state.slot is None and state.idle
    if state.phase in ("running", "parking", "resuming"):
        assert state.pages and state.slot is not None
    if state.phase == "parked":
        assert state.parked is not None
    if state.phase in ("running", "resuming"):
        adapter = adapters.adapter_of(book, state)
        there = adapter is None or adapter.leaving or adapters.is_there(book, state)
        assert there, f"request {state.id} runs without its adapter"
    if not state.dirty and state.phase != "finished":
        assert state.computed <= state.planned <= state.length


def _check_shared(book: Book, state: RequestState) -> None:
    """No step in flight writes a page that others may read."""
    if state.copying:
        return
    memory = book.memory(state.request.model)
    first = state.computed // memory.spec.page_tokens
    for page in state.pages[first:]:
        assert memory.kv.live[page] == 1, f"page {page} is shared and written"
        assert page not in memory.kv.index.by_page, f"page {page} is known and written"

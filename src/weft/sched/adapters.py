"""Adapters in the scheduler: who uses one, and what must be there before a request runs.

An adapter is a `ModelEntry` without members, KV or turns: its requests are members of its base. One
rule keeps it simple: while a request is running or resuming, its adapter is resident. A request is
admitted only when its adapter is there, and an adapter that is sent away takes those that run with
it along (they are parked). So whoever holds device memory can use it, and room for base, adapter
and one request is all that is ever needed to go on.
"""

from weft.core.ids import ModelName
from weft.sched.book import Book, ModelEntry, RequestState


def users(entry: ModelEntry) -> list[RequestState]:
    """Unfinished requests that need this entry: a model's members, or those of an adapter's base
    that name the adapter."""
    return list((entry.members if entry.spec.base is None else entry.riders).values())


def used(entry: ModelEntry) -> bool:
    """Whether it has `users`."""
    return bool(entry.members if entry.spec.base is None else entry.riders)


def in_use(entry: ModelEntry) -> bool:
    """Whether a request that needs this entry has its KV on the device, or on its way there."""
    return any(s.phase in ("running", "resuming") for s in users(entry))


def adapter_of(book: Book, state: RequestState) -> ModelEntry | None:
    """It stays known while it has users."""
    name = state.request.adapter
    return book.models[name] if name is not None else None


def is_there(book: Book, state: RequestState) -> bool:
    """Whether rows of this request may be planned, as far as its adapter goes."""
    entry = adapter_of(book, state)
    if entry is None:
        return True
    return entry.leaving is None and book.memory(entry.spec.name).state == "resident"


def granules_missing(book: Book, state: RequestState) -> int:
    """What its adapter takes that is not on the device."""
    entry = adapter_of(book, state)
    if entry is None:
        return 0
    memory = book.memory(entry.spec.name)
    return memory.weight_granules if memory.state == "absent" else 0


def names(book: Book, states: list[RequestState]) -> list[ModelName]:
    """The adapters of these requests, each once, in order."""
    found = dict.fromkeys([s.request.adapter for s in states])
    return [name for name in found if name is not None]

"""Mapping as actions ask for it; and checks that what an action touches is mapped: for tests, where
a stray access should be an error with a name and not a crash or a zero."""

from collections.abc import Mapping, Sequence

from weft.core.actions import Drop, MapKv, StepPlan, UnmapKv
from weft.core.model import ModelSpec
from weft.memory.base import UNMAPPED, Arena, ArenaError


def remap(arena: Arena, action: MapKv | UnmapKv | Drop) -> None:
    """Carry out an action that copies nothing. The caller holds the arena. Raises ArenaError."""
    match action:
        case MapKv():
            arena.map(action.model, "kv", action.at, action.granules)
        case UnmapKv():
            arena.unmap(action.model, "kv", action.at, action.granules)
        case Drop():
            at = range(len(action.granules))
            arena.unmap(action.model, "weights", at, action.granules)


def check_weights_mapped(spec: ModelSpec, held: Sequence[int]) -> None:
    """held: the granule at every virtual granule of the weight range. Raises ArenaError."""
    if UNMAPPED in held:
        raise ArenaError(f"{spec.name}: a step without its weights")


def check_adapters_mapped(plan: StepPlan, mapped: Mapping[str, Sequence[int]]) -> None:
    """mapped: as `Arena.mapped`. Raises ArenaError."""
    for row in plan.rows:
        if row.adapter is not None and UNMAPPED in mapped[f"{row.adapter}/weights"]:
            raise ArenaError(f"{row.adapter}: a step without the adapter of {row.request}")


def check_pages_mapped(
    spec: ModelSpec, granule_bytes: int, held: Sequence[int], pages: Sequence[int], who: str
) -> None:
    """held: the granule at every virtual granule of the KV range. Raises ArenaError."""
    for page in pages:
        first = page * spec.page_bytes // granule_bytes
        last = ((page + 1) * spec.page_bytes - 1) // granule_bytes
        if last >= len(held) or UNMAPPED in held[first : last + 1]:
            raise ArenaError(f"{spec.name}: page {page} of {who} is not mapped")

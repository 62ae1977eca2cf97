"""Checks that what an action touches is mapped; for tests, where a stray access should be an error
with a name and not a crash or a zero."""

from collections.abc import Sequence

from weft.core.model import ModelSpec
from weft.memory.base import UNMAPPED, ArenaError


def check_weights_mapped(spec: ModelSpec, held: Sequence[int]) -> None:
    """held: the granule at every virtual granule of the weight range. Raises ArenaError."""
    if UNMAPPED in held:
        raise ArenaError(f"{spec.name}: a step without its weights")


def check_pages_mapped(
    spec: ModelSpec, granule_bytes: int, held: Sequence[int], pages: Sequence[int], who: str
) -> None:
    """held: the granule at every virtual granule of the KV range. Raises ArenaError."""
    for page in pages:
        first = page * spec.page_bytes // granule_bytes
        last = ((page + 1) * spec.page_bytes - 1) // granule_bytes
        if last >= len(held) or UNMAPPED in held[first : last + 1]:
            raise ArenaError(f"{spec.name}: page {page} of {who} is not mapped")

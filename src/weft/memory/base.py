"""The arena: physical granules mapped beneath address ranges that never move.

The ledger decides which granule lies where; an arena obeys, checks and refuses. Every model has
two virtual ranges, "weights" and "kv", reserved once and stable until `release`, so pointers,
views and CUDA graphs survive eviction.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

RangeName = Literal["weights", "kv"]
RANGE_NAMES: tuple[RangeName, ...] = ("weights", "kv")
UNMAPPED = -1


class ArenaError(RuntimeError):
    """An order that contradicts what is mapped, or a range that does not exist.

    It means that ledger and arena disagree: a bug, or memory the device refused. The order had no
    effect at all (checks come before the first change).
    """


def range_granules(num_bytes: int, granule_bytes: int) -> int:
    """Virtual granules of a range that holds at least `num_bytes`."""
    return -(-num_bytes // granule_bytes)


class Arena(Protocol):
    """`map`, `unmap` are called by one thread at a time; `tensor` by any."""

    @property
    def granule_bytes(self) -> int: ...

    @property
    def num_granules(self) -> int:
        """Physical granules: ids 0 .. num_granules - 1. Never more are mapped at once."""
        ...

    def reserve(self, model: str, weights_bytes: int, kv_bytes: int) -> None:
        """Reserve both ranges of a model, each rounded up to whole granules; maps nothing.

        Raises ArenaError if the model is reserved already or the address space is refused.
        """
        ...

    def map(
        self, model: str, range_name: RangeName, at: Sequence[int], granules: Sequence[int]
    ) -> None:
        """Put physical granule `granules[i]` at virtual granule `at[i]` of the range.

        Contents are undefined afterwards. Raises ArenaError, and changes nothing, if the model or
        a place is unknown, a place is mapped, or a granule is out of range or mapped anywhere.
        """
        ...

    def unmap(
        self, model: str, range_name: RangeName, at: Sequence[int], granules: Sequence[int]
    ) -> None:
        """Take `granules[i]` away from `at[i]`; the contents are lost.

        The caller has seen to it that no kernel or copy still touches them. Raises ArenaError, and
        changes nothing, if any `at[i]` does not hold exactly `granules[i]`.
        """
        ...

    def tensor(self, model: str, range_name: RangeName) -> torch.Tensor:
        """uint8 [virtual granules * granule_bytes] over the whole range, mapped or not.

        Touching a part that is not mapped is an illegal access on CUDA; on the CPU it reads zeros
        or breaks the budget unseen. Valid until `release`.
        """
        ...

    def mapped(self) -> dict[str, tuple[int, ...]]:
        """Per "model/weights" and "model/kv": the granule at every virtual granule, -1 = none."""
        ...

    def release(self, model: str) -> None:
        """Give both ranges back. Raises ArenaError if something is still mapped in them."""
        ...

    def close(self) -> None:
        """Unmap and release everything. Idempotent."""
        ...


def mapping_difference(
    arena: dict[str, tuple[int, ...]], ledger: dict[str, tuple[int, ...]]
) -> str | None:
    """First difference between the arena's mapping and the ledger's, in words; None if equal.

    Ranges that one side does not know count as unmapped, trailing unmapped granules do not count.
    """
    for key in sorted(arena.keys() | ledger.keys()):
        ours, theirs = arena.get(key, ()), ledger.get(key, ())
        for i in range(max(len(ours), len(theirs))):
            have = ours[i] if i < len(ours) else UNMAPPED
            want = theirs[i] if i < len(theirs) else UNMAPPED
            if have != want:
                return f"{key}[{i}]: the arena has granule {have}, the ledger {want}"
    return None

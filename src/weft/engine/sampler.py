"""Drawing tokens from logits, on any device, without reading anything back.

Noise is a hash of (seed, output position, token id), computed in integer tensor arithmetic that is
the same on every device: what a row draws does not depend on where, when or beside whom it runs.

Shape legend: S sampling rows, V vocabulary, K stop ids (padded with -1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.core.actions import Row


@dataclass(frozen=True)
class SamplingBatch:
    """Parameters of the rows of a step that sample, in row order. Tensors are device tensors."""

    temperature: torch.Tensor
    """float64 [S]; 0 is greedy."""
    top_p: torch.Tensor
    """float64 [S]; 1 means no truncation."""
    top_k: torch.Tensor
    """int64 [S]; 0 means no truncation."""
    seed: torch.Tensor
    """int64 [S]: the seed's low 64 bits, two's complement."""
    output_index: torch.Tensor
    """int64 [S]: position of the drawn token in the output; the counter of the noise."""
    stop_ids: torch.Tensor
    """int64 [S, K], padded with -1."""
    min_remaining: torch.Tensor
    """int64 [S]: stop ids are masked while this is above 0."""
    any_random: bool = True
    """False: all rows are greedy (a host fact, known when the step is planned)."""
    any_truncated: bool = True
    """False: no random row has top_k or top_p."""
    any_masked: bool = True
    """False: no row has min_remaining > 0."""

    @classmethod
    def from_rows(cls, rows: Sequence[Row], device: torch.device | str = "cpu") -> "SamplingBatch":
        """The rows with `sample` set, in order."""
        ...

    def advance_(self) -> None:
        """In place, on the device: the next iteration of a repeated step."""
        ...


def sample(logits_SV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """int64 [S]: the token each row draws. Greedy ties go to the lowest id.

    logits may be a view with padded rows; NaN logits draw token 0 rather than fail.
    """
    ...

"""What is done to logits before a token is drawn: grammar masks, bias, penalties.

The host works out which entries of which rows change; the device changes them, each by itself, so
that nothing depends on the order of sums or on the company of a row.

Shape legend: S sampling rows, V vocabulary, B bias entries, E penalised entries, G rows with a
grammar, W 32-bit words of a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from weft.core.actions import Row

_NO_IDS = np.zeros(0, dtype=np.int64)
_NO_VALUES = np.zeros(0, dtype=np.float64)


@dataclass(frozen=True)
class Entries:
    """Places in logits [S, V], each at most once. Device tensors."""

    rows: torch.Tensor
    """int64."""
    ids: torch.Tensor
    """int64."""


@dataclass(frozen=True)
class Bias:
    at: Entries
    values: torch.Tensor
    """float64 [B]."""


@dataclass(frozen=True)
class Penalties:
    at: Entries
    factors: torch.Tensor
    """float64 [E]: repetition penalty; positive logits are divided by it, others multiplied."""
    shifts: torch.Tensor
    """float64 [E]: presence and frequency penalty together, taken off afterwards."""


@dataclass(frozen=True)
class Masks:
    rows: torch.Tensor
    """int64 [G]."""
    words: torch.Tensor
    """int32 [G, W]: a set bit lets a token id through, lowest bit first."""


@dataclass(frozen=True)
class Adjustments:
    """Applied in this order: masks, bias, penalties."""

    masks: Masks | None = None
    bias: Bias | None = None
    penalties: Penalties | None = None

    def __bool__(self) -> bool:
        return not (self.masks is None and self.bias is None and self.penalties is None)


def bias_arrays(rows: Sequence[Row]) -> list[np.ndarray]:
    """rows, ids and values of all biases of the sampling rows; an id named twice counts twice."""
    if not any(row.sample is not None and row.sample.logit_bias for row in rows):
        return [_NO_IDS, _NO_IDS, _NO_VALUES]
    at: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for i, row in enumerate(rows):
        total: dict[int, float] = {}
        for token, value in row.sample.logit_bias if row.sample is not None else ():
            total[token] = total.get(token, 0.0) + value
        at.extend([i] * len(total))
        ids.extend(total.keys())
        values.extend(total.values())
    return [
        np.array(at, dtype=np.int64),
        np.array(ids, dtype=np.int64),
        np.array(values, dtype=np.float64),
    ]


def penalty_arrays(rows: Sequence[Row]) -> list[np.ndarray]:
    """rows, ids, factors and shifts of all penalties of the sampling rows."""
    parts: list[list[np.ndarray]] = [[_NO_IDS], [_NO_IDS], [_NO_VALUES], [_NO_VALUES]]
    for i, row in enumerate(rows):
        sampling = row.sample
        if sampling is None or not sampling.penalised:
            continue
        seen, counts = np.unique(np.array(row.outputs, dtype=np.int64), return_counts=True)
        shift = sampling.presence_penalty + sampling.frequency_penalty * counts
        prompt = _as_array(row.prompt_ids)
        only_prompt = prompt[np.isin(prompt, seen, assume_unique=True, invert=True, kind="table")]
        ids = np.concatenate((seen, only_prompt))
        parts[0].append(np.full(len(ids), i, dtype=np.int64))
        parts[1].append(ids)
        parts[2].append(np.full(len(ids), sampling.repetition_penalty))
        parts[3].append(np.concatenate((shift, np.zeros(len(only_prompt)))))
    return [np.concatenate(part) for part in parts]


class _Same:
    """A tuple by its identity: comparing or hashing 20,000 ids would take as long as reading
    them. While it is remembered nothing else has its place in memory."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.tuple = ids

    def __hash__(self) -> int:
        return id(self.tuple)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tuple is other.tuple


@lru_cache(maxsize=64)
def _of_tuple(ids: _Same) -> np.ndarray:
    return np.array(ids.tuple, dtype=np.int64)


def _as_array(ids: tuple[int, ...]) -> np.ndarray:
    """A prompt's ids come as the same object with every step of a request."""
    return _of_tuple(_Same(ids))


def adjust(logits_SV: torch.Tensor, adjustments: Adjustments) -> torch.Tensor:
    """New logits in float32, in float64 for float64 logits."""
    wide = torch.float64 if logits_SV.dtype == torch.float64 else torch.float32
    x_SV = logits_SV.to(wide, copy=True)
    if adjustments.masks is not None:
        _apply_masks(x_SV, adjustments.masks)
    if adjustments.bias is not None:
        at = adjustments.bias.at
        x_SV[at.rows, at.ids] += adjustments.bias.values.to(wide)
    if adjustments.penalties is not None:
        at, factors = adjustments.penalties.at, adjustments.penalties.factors.to(wide)
        x_E = x_SV[at.rows, at.ids]
        x_E = torch.where(x_E > 0, x_E / factors, x_E * factors)
        x_SV[at.rows, at.ids] = x_E - adjustments.penalties.shifts.to(wide)
    return x_SV


def _apply_masks(x_SV: torch.Tensor, masks: Masks) -> None:
    ids_V = torch.arange(x_SV.shape[1], device=x_SV.device)
    bits_GV = (masks.words[:, ids_V >> 5] >> (ids_V & 31).to(torch.int32)) & 1
    x_SV[masks.rows] = x_SV[masks.rows].masked_fill(bits_GV == 0, float("-inf"))

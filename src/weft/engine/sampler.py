"""Drawing tokens from logits, on any device, without reading anything back.

A random token is the one with the largest logit / temperature + Gumbel noise, which draws from the
softmax exactly (Gumbel-max). The noise is a hash of (seed, output position, token id) in integer
tensor arithmetic that is the same on every device: what a row draws does not depend on where,
when or beside whom it runs. Sums that decide a truncation are integer sums, so that their order
does not matter either.

Shape legend: S sampling rows, V vocabulary, K stop ids (padded with -1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from weft.core.actions import Row

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64: splitmix64's increment
_MIX1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_QUANTUM = float(1 << 52)
"""Probabilities are summed as multiples of 1 / _QUANTUM."""


@dataclass(frozen=True)
class SamplingBatch:
    """Parameters of the rows of a step that sample, in row order. Tensors are device tensors."""

    temperature: torch.Tensor
    """float64 [S]; 0 is greedy."""
    top_p: torch.Tensor
    """float64 [S]; 1 means no truncation."""
    top_k: torch.Tensor
    """int64 [S]; 0 means no truncation."""
    min_p: torch.Tensor
    """float64 [S]; 0 means no truncation."""
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
    any_min_p: bool = True
    """False: no random row has min_p."""
    any_masked: bool = True
    """False: no row has min_remaining > 0 and stop ids."""

    @classmethod
    def from_rows(cls, rows: Sequence[Row], device: torch.device | str = "cpu") -> "SamplingBatch":
        """The rows with `sample` set, in order."""
        pairs = [(row, row.sample) for row in rows if row.sample is not None]
        width = max((len(row.stop_ids) for row, _ in pairs), default=0)
        stops = [[*row.stop_ids, *[-1] * (width - len(row.stop_ids))] for row, _ in pairs]
        batch = cls(
            temperature=torch.tensor([s.temperature for _, s in pairs], dtype=torch.float64),
            top_p=torch.tensor([s.top_p for _, s in pairs], dtype=torch.float64),
            top_k=torch.tensor([s.top_k for _, s in pairs], dtype=torch.int64),
            min_p=torch.tensor([s.min_p for _, s in pairs], dtype=torch.float64),
            seed=torch.tensor([signed64(s.seed) for _, s in pairs], dtype=torch.int64),
            output_index=torch.tensor([row.output_index for row, _ in pairs], dtype=torch.int64),
            stop_ids=torch.tensor(stops, dtype=torch.int64).view(len(pairs), width),
            min_remaining=torch.tensor([row.min_remaining for row, _ in pairs], dtype=torch.int64),
            any_random=any(not s.greedy for _, s in pairs),
            any_truncated=any(not s.greedy and (s.top_k > 0 or s.top_p < 1.0) for _, s in pairs),
            any_min_p=any(not s.greedy and s.min_p > 0.0 for _, s in pairs),
            any_masked=any(row.min_remaining > 0 and row.stop_ids for row, _ in pairs),
        )
        return batch if str(device) == "cpu" else batch.to(device)

    def to(self, device: torch.device | str) -> "SamplingBatch":
        """The same on another device, without waiting where the memory is pinned."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return SamplingBatch(**moved)

    def advance_(self) -> None:
        """In place, on the device: the next iteration of a repeated step."""
        self.output_index.add_(1)
        self.min_remaining.sub_(1)


@torch.inference_mode()
def sample(logits_SV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """int64 [S]: the token each row draws. Equal scores go to the lowest id.

    Computes in float32, in float64 for float64 logits. logits may be a view into wider rows; NaN
    counts as minus infinity. After the temperature come min_p, then top_k, then top_p.
    """
    wide = torch.float64 if logits_SV.dtype == torch.float64 else torch.float32
    x_SV = logits_SV.to(wide)
    x_SV = torch.where(torch.isnan(x_SV), float("-inf"), x_SV)
    if batch.any_masked:
        x_SV = x_SV.masked_fill(_stop_mask(batch, x_SV.shape[1]), float("-inf"))
    ids_V = torch.arange(x_SV.shape[1], device=x_SV.device)
    if not batch.any_random:
        return _argmax(x_SV, ids_V)
    greedy_S1 = (batch.temperature == 0)[:, None]
    divisor_S1 = torch.where(greedy_S1, 1.0, batch.temperature[:, None]).to(wide)
    # Differences to the largest logit: no overflow at tiny temperatures; inf - inf counts as 0.
    scaled_SV = ((x_SV - x_SV.amax(-1, keepdim=True)) / divisor_S1).nan_to_num(
        nan=0.0, neginf=float("-inf")
    )
    if batch.any_min_p:
        limit_S1 = torch.where(greedy_S1, float("-inf"), batch.min_p.log()[:, None]).to(wide)
        scaled_SV = scaled_SV.masked_fill(scaled_SV < limit_S1, float("-inf"))
    noise_SV = gumbel_noise(batch.seed, batch.output_index, ids_V, wide)
    score_SV = torch.where(greedy_S1, scaled_SV, scaled_SV + noise_SV)
    if not batch.any_truncated:
        return _argmax(score_SV, ids_V)
    kept_SV, order_SV = _truncate(scaled_SV, batch)
    ranked_SV = score_SV.gather(1, order_SV).masked_fill(~kept_SV, float("-inf"))
    return _argmax(ranked_SV, order_SV)


def gumbel_noise(
    seed_S: torch.Tensor, index_S: torch.Tensor, ids_V: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Standard Gumbel noise [S, V], a function of (seed, output index, token id) alone."""
    bits_SV = noise_bits(seed_S, index_S, ids_V)
    # uniform in (0, 1), finest near 0, where it decides; -log(-log1p(-u)) is Gumbel
    if dtype == torch.float64:
        uniform = (_shift(bits_SV, 11) * 2 + 1).to(dtype) * 2.0**-54
        uniform = uniform.clamp_(max=1 - 2.0**-53)
    else:
        uniform = (_shift(bits_SV, 32) * 2 + 1).to(dtype) * 2.0**-33
        uniform = uniform.clamp_(max=1 - 2.0**-24)
    return torch.log1p(-uniform).neg_().log_().neg_()


def noise_bits(seed_S: torch.Tensor, index_S: torch.Tensor, ids_V: torch.Tensor) -> torch.Tensor:
    """64 random bits [S, V] as int64, the same on every device: splitmix64's output function over
    a counter of token ids, keyed by seed and output index."""
    key_S = _mix(seed_S * _MIX2 + (index_S + 1) * _GOLDEN)
    return _mix(key_S[:, None] + (ids_V + 1)[None] * _GOLDEN)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood 2014); int64 products wrap around."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _truncate(scaled_SV: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which ranks are kept [S, V] bool, and the token id at each rank [S, V]; rank 0 is the most
    probable token, equal ones by id, and is always kept."""
    sorted_SV, order_SV = torch.sort(scaled_SV, dim=-1, descending=True, stable=True)
    rank_V = torch.arange(sorted_SV.shape[1], device=sorted_SV.device)
    top_k_S1 = batch.top_k[:, None]
    kept_SV = (rank_V[None] < top_k_S1) | (top_k_S1 <= 0)
    inside_SV = sorted_SV.masked_fill(~kept_SV, float("-inf"))
    weight_SV = torch.softmax(inside_SV, dim=-1).to(torch.float64)
    count_SV = (weight_SV * _QUANTUM).round().to(torch.int64)
    before_SV = count_SV.cumsum(-1) - count_SV
    top_p_S1 = batch.top_p[:, None]
    limit_S1 = top_p_S1 * count_SV.sum(-1, keepdim=True).to(torch.float64)
    kept_SV &= (before_SV.to(torch.float64) < limit_S1) | (top_p_S1 >= 1)
    kept_SV |= (rank_V == 0)[None] | (batch.temperature == 0)[:, None]
    return kept_SV, order_SV


def _stop_mask(batch: SamplingBatch, vocab: int) -> torch.Tensor:
    """bool [S, V]: stop ids of rows that must go on."""
    stops = batch.stop_ids
    usable = (stops >= 0) & (stops < vocab) & (batch.min_remaining > 0)[:, None]
    mask = torch.zeros((stops.shape[0], vocab + 1), dtype=torch.bool, device=stops.device)
    return mask.scatter_(1, torch.where(usable, stops, vocab), True)[:, :vocab]


def _argmax(x_SV: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The lowest of ids [V] or [S, V] where the row's maximum lies, said explicitly: which of
    equals torch.argmax names is nobody's promise."""
    best = x_SV == x_SV.amax(-1, keepdim=True)
    return torch.where(best, ids, x_SV.shape[1]).amin(-1)


def signed64(seed: int) -> int:
    """The low 64 bits as two's complement."""
    low = seed & ((1 << 64) - 1)
    return low - (1 << 64) if low >> 63 else low

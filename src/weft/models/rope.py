"""Rotary tables: the angle of every position, for each of transformers' rope kinds.

A token's K must be a function of the token and what is before it, never of how long its request
has become or of what shares its step (promise 3). In transformers `dynamic` and `longrope` change
all frequencies when a sequence outgrows the original length. Here they are chosen once, for the
longest context the model is served with (as vLLM does): equal to transformers on a sequence of that
length, and on every sequence if that is at most the original length.

Sources: transformers.modeling_rope_utils; YaRN https://arxiv.org/abs/2309.00071; LongRoPE
https://arxiv.org/abs/2402.13753.

Shape legend: E = rotary dim / 2, P positions.
"""

import math

import torch

from weft.core.model import RopeSpec


def rope_tables(
    rope: RopeSpec,
    head_dim: int,
    num_positions: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    context_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [P, E] in `dtype`: float32 arithmetic rounded to `dtype` as in transformers,
    except that float64 is computed in float64.

    context_tokens: the longest context the model is served with; default num_positions. The table's
    length must not decide what is in it where units of different sizes serve one model.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequency_E = _frequencies(
        rope, rope.rotary_dim or head_dim, context_tokens or num_positions, wide
    )
    angle_PE = torch.arange(num_positions, dtype=wide)[:, None] * frequency_E[None, :]
    scale = rope.attention_factor
    return (angle_PE.cos() * scale).to(device, dtype), (angle_PE.sin() * scale).to(device, dtype)


def _frequencies(rope: RopeSpec, dim: int, context: int, wide: torch.dtype) -> torch.Tensor:
    exponent_E = torch.arange(0, dim, 2, dtype=wide) / dim
    match rope.kind:
        case "default":
            return 1.0 / rope.theta**exponent_E
        case "linear":
            return 1.0 / rope.theta**exponent_E / rope.factor
        case "dynamic":
            longer = max(context, rope.original_max_position) / rope.original_max_position
            stretch = rope.factor * longer - (rope.factor - 1)
            return 1.0 / (rope.theta * stretch ** (dim / (dim - 2))) ** exponent_E
        case "llama3":
            return _llama3(rope, 1.0 / rope.theta**exponent_E)
        case "yarn":
            return _yarn(rope, dim, rope.theta**exponent_E)
        case "longrope":
            is_long = context > rope.original_max_position
            divisors = rope.long_factor if is_long else rope.short_factor
            return 1.0 / (torch.tensor(divisors, dtype=wide) * rope.theta**exponent_E)


def _llama3(rope: RopeSpec, frequency_E: torch.Tensor) -> torch.Tensor:
    """Low frequencies are divided by the factor, high ones stay, those between are blended."""
    low, high, old = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
    wavelength = 2 * math.pi / frequency_E
    smooth = (old / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequency_E / rope.factor + smooth * frequency_E
    scaled = torch.where(wavelength > old / low, frequency_E / rope.factor, frequency_E)
    medium = (wavelength >= old / high) & (wavelength <= old / low)
    return torch.where(medium, blended, scaled)


def _yarn(rope: RopeSpec, dim: int, period_E: torch.Tensor) -> torch.Tensor:
    """A ramp over the dimensions, from frequencies that stay to frequencies that are divided."""

    def turning(rotations: float) -> float:
        """The dimension that turns so often within the original length."""
        turns = math.log(rope.original_max_position / (rotations * 2 * math.pi))
        return dim * turns / (2 * math.log(rope.theta))

    low, high = turning(rope.beta_fast), turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp_E = torch.arange(dim // 2, dtype=torch.float32).to(period_E.dtype)
    ramp_E = ((ramp_E - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * period_E) * ramp_E + 1.0 / period_E * (1 - ramp_E)

"""Seeded arrival processes and lengths. The same seed gives the same workload everywhere."""

import random
from collections.abc import Sequence

from weft.core.errors import WeftError
from weft.workload.trace import TraceRow


def poisson_arrivals(rate_per_s: float, num: int, *, seed: int) -> tuple[int, ...]:
    """Arrival times in ns of `num` requests with exponential gaps."""
    return gamma_arrivals(rate_per_s, num, cv=1.0, seed=seed)


def gamma_arrivals(rate_per_s: float, num: int, *, cv: float, seed: int) -> tuple[int, ...]:
    """Gaps from a Gamma distribution with mean 1 / rate and coefficient of variation `cv`: above 1
    bursty, 1 Poisson, below 1 regular, 0 a metronome."""
    if not (rate_per_s > 0 and num >= 0 and 0 <= cv <= 100):
        raise WeftError(f"arrivals need rate > 0, count >= 0 and cv in 0 .. 100, got cv {cv}")
    rng = random.Random(f"weft-arrivals-{seed}")
    shape = 1 / cv**2 if cv else 0.0
    now_s, times = 0.0, []
    for _ in range(num):
        gap = rng.gammavariate(shape, 1 / (shape * rate_per_s)) if cv else 1 / rate_per_s
        now_s += gap
        times.append(round(now_s * 1e9))
    return tuple(times)


def uniform_rows(
    arrivals_ns: Sequence[int],
    *,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    seed: int,
    service: str = "uniform",
) -> tuple[TraceRow, ...]:
    """Rows at the given times with lengths uniform in the two inclusive ranges."""
    for low, high in (prompt_tokens, output_tokens):
        if not 1 <= low <= high:
            raise WeftError(f"a range of lengths must be 1 <= low <= high, got {low} .. {high}")
    rng = random.Random(f"weft-lengths-{seed}")
    return tuple(
        TraceRow(
            arrival_ns=at,
            service=service,
            prompt_tokens=rng.randint(*prompt_tokens),
            output_tokens=rng.randint(*output_tokens),
        )
        for at in arrivals_ns
    )

"""What one API key may take: requests and tokens a minute, cold models a minute.

Plain objects told the time; whoever asks gets the seconds to wait, or None for "go on".
"""

import math
from collections.abc import Callable

MINUTE_S = 60.0


class TokenBucket:
    """`per_minute` units a minute, filled evenly; full at first and never fuller than one minute's
    worth. It may be overdrawn: what is owed is waited for before anything new begins."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._capacity = float(per_minute)
        self._level = self._capacity
        self._at_s = now_s

    def _fill(self, now_s: float) -> None:
        gained = (now_s - self._at_s) * self._capacity / MINUTE_S
        self._level = min(self._capacity, self._level + max(0.0, gained))
        self._at_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float | None:
        """Seconds until `amount` is there; None if it is. One that is larger than the bucket needs
        the bucket full, so that it can begin at all."""
        self._fill(now_s)
        missing = min(amount, self._capacity) - self._level
        # A rounding error is no reason to send somebody away.
        return None if missing <= 1e-6 else missing * MINUTE_S / self._capacity

    def take(self, amount: float, now_s: float) -> None:
        self._fill(now_s)
        self._level -= amount


class ColdModels:
    """The distinct models that a key called in while they were on no device, in the last minute."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._called_s: dict[str, float] = {}

    def wait_s(self, model: str, now_s: float) -> float | None:
        """Seconds until `model` may be called in; None: now."""
        called = self._called_s
        for name in [name for name, at_s in called.items() if at_s <= now_s - MINUTE_S]:
            del called[name]
        if model in called or len(called) < self._per_minute:
            return None
        return min(called.values(), default=now_s) + MINUTE_S - now_s

    def note(self, model: str, now_s: float) -> None:
        """It was called in; a model that was called before counts from then."""
        self._called_s.setdefault(model, now_s)


class KeyLimits:
    """The limits of one key, None where it has none, and what it has used of them."""

    def __init__(
        self,
        *,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        cold_models_per_minute: int | None,
        clock: Callable[[], float],
    ) -> None:
        now_s = clock()
        self._clock = clock
        self._requests = TokenBucket(requests_per_minute, now_s) if requests_per_minute else None
        self._tokens = TokenBucket(tokens_per_minute, now_s) if tokens_per_minute else None
        self._cold = None
        if cold_models_per_minute is not None:
            self._cold = ColdModels(cold_models_per_minute)

    @property
    def bounds_cold_models(self) -> bool:
        return self._cold is not None

    def take_request(self) -> int | None:
        """Count one request. Whole seconds to wait if it is one too many (it is then not counted),
        else None."""
        if self._requests is None:
            return None
        now_s = self._clock()
        wait_s = self._requests.wait_s(1, now_s)
        if wait_s is None:
            self._requests.take(1, now_s)
        return _whole_s(wait_s)

    def wait_for_tokens(self, tokens: int) -> int | None:
        """Whole seconds until a prompt of so many tokens may begin; None: now."""
        if self._tokens is None:
            return None
        return _whole_s(self._tokens.wait_s(tokens, self._clock()))

    def charge_tokens(self, tokens: int) -> None:
        """They were admitted or made; also more than there is left."""
        if self._tokens is not None and tokens:
            self._tokens.take(tokens, self._clock())

    def call_in(self, model: str) -> int | None:
        """Count a cold model. Whole seconds to wait if it is one too many, else None."""
        if self._cold is None:
            return None
        now_s = self._clock()
        wait_s = self._cold.wait_s(model, now_s)
        if wait_s is None:
            self._cold.note(model, now_s)
        return _whole_s(wait_s)


def _whole_s(wait_s: float | None) -> int | None:
    return None if wait_s is None else max(1, math.ceil(wait_s))

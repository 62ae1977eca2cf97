"""Typed, bounded look-ups in a stranger's JSON object, with errors that name file and key."""

import math
from typing import Any, NoReturn

from weft.core.errors import WeftError


def is_int(value: object) -> bool:
    """An integer that is not a boolean (JSON's true is an int in Python)."""
    return isinstance(value, int) and not isinstance(value, bool)


class Reader:
    """One JSON object. A key that is null counts as absent."""

    def __init__(self, where: str, raw: dict[str, Any]) -> None:
        self.where = where
        self.raw = raw

    def fail(self, key: str, message: str) -> NoReturn:
        raise WeftError(f"{self.where}: `{key}`: {message}")

    def integer(self, key: str, low: int, high: int, *, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                self.fail(key, "is missing")
            return default
        if not is_int(value) or not low <= value <= high:
            self.fail(key, f"must be an integer in {low} .. {high}")
        return int(value)

    def number(self, key: str, low: float, high: float, *, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                self.fail(key, "is missing")
            return default
        return self._number(key, value, low, high)

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of exactly `count` numbers."""
        value = self.raw.get(key)
        if not isinstance(value, list) or len(value) != count:
            self.fail(key, f"must be a list of {count} numbers")
        return tuple(self._number(key, one, low, high) for one in value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, "must be true or false")
        return bool(value)

    def object(self, key: str) -> "Reader":
        """The object under `key`, empty if absent."""
        value = self.raw.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self.fail(key, f"must be an object, got {type(value).__name__}")
        return Reader(f"{self.where}: `{key}`", value)

    def _number(self, key: str, value: object, low: float, high: float) -> float:
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not low <= value <= high
        ):
            self.fail(key, f"must be a number in {low:g} .. {high:g}")
        if not math.isfinite(value):
            self.fail(key, "must be finite")
        return float(value)

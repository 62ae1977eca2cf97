"""Values that people write with a unit: sizes such as 48M, durations such as 10m."""

import re
from typing import Any

from weft.core.errors import WeftError

_SIZES = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = r"(\d+(?:\.\d+)?)(ms|s|m|h|d)"
DURATION_PATTERN = f"^{_DURATION}+$".replace("(", "(?:")
MAX_TEXT = 64
MAX_DEPTH = 32
MAX_VALUES = 1 << 20
"""Of one file, each counted wherever an alias of YAML repeats it."""


def parse_bytes(text: str) -> int:
    """ "48M", "1.5GiB", "1000000" -> bytes (powers of 1024). Raises WeftError."""
    match = None
    if len(text) <= MAX_TEXT:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise WeftError(f"not a size: {text[:40]!r}; write a number and K, M, G or T, such as 48M")
    return int(float(match[1]) * _SIZES[match[2].upper()])


def parse_duration(text: str) -> float:
    """ "90s", "10m", "1h30m", "250ms" -> seconds. Raises WeftError."""
    compact = text.strip().lower()
    if len(text) > MAX_TEXT or not re.fullmatch(f"(?:{_DURATION})+", compact):
        raise WeftError(
            f"not a duration: {text[:40]!r}; write a number and ms, s, m, h or d, such as 10m"
        )
    return sum(float(n) * _SECONDS[unit] for n, unit in re.findall(_DURATION, compact))


def check_values(raw: Any, source: str) -> None:
    """Raises WeftError for values that a few lines of aliases multiply without end, and for texts
    with a zero character, which no path can hold."""
    left = MAX_VALUES
    stack = [raw]
    while stack:
        value = stack.pop()
        if isinstance(value, str) and "\0" in value:
            raise WeftError(f"{source}: {value[:40]!r} has a zero character; leave it out")
        if isinstance(value, dict | list):
            left -= len(value)
            if left < 0:
                raise WeftError(
                    f"{source}: its aliases make more than {MAX_VALUES} values; write them out"
                )
            stack.extend(value.values() if isinstance(value, dict) else value)


def with_durations(raw: Any, path: str = "$", depth: int = 0) -> Any:
    """Plain values in which every text under a key that ends in `_s` has become seconds. Raises
    WeftError with the key's path."""
    if depth > MAX_DEPTH:
        raise WeftError(f"`{path[:100]}` is nested too deeply")
    if isinstance(raw, list):
        return [with_durations(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(raw)]
    if not isinstance(raw, dict):
        return raw
    out: dict[Any, Any] = {}
    for key, value in raw.items():
        where = f"{path}.{key}"
        if isinstance(key, str) and key.endswith("_s") and isinstance(value, str):
            try:
                out[key] = parse_duration(value)
            except WeftError as error:
                raise WeftError(f"`{where}`: {error}") from None
        else:
            out[key] = with_durations(value, where, depth + 1)
    return out

"""Reading JSON that strangers wrote: bounded in size and depth, no duplicates, no NaN."""

import json
import re
from pathlib import Path
from typing import Any

from weft.core.errors import WeftError

MAX_CONFIG_BYTES = 8 << 20
MAX_DEPTH = 32

# Possessive, and a string without its end takes all the rest: linear, whatever a stranger wrote.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def read_json(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises WeftError naming the file, whatever is wrong with it."""
    try:
        if not path.is_file():
            raise WeftError(f"{path}: no such file; is this a Hugging Face model folder?")
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise WeftError(f"{path}: cannot be read: {error}") from None
    if len(raw) > max_bytes:
        raise WeftError(f"{path}: larger than {max_bytes} bytes; not a model's configuration")
    _check_depth(raw, str(path))
    return parse_object(raw, str(path))


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object from bytes. Raises WeftError beginning with `where`."""
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except RecursionError:
        raise WeftError(f"{where}: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, too many digits
        raise WeftError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeftError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _check_depth(raw: bytes, where: str) -> None:
    depth = 0
    for match in _STRUCTURE.finditer(raw):
        token = match[0][:1]
        if token in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise WeftError(f"{where}: nested deeper than {MAX_DEPTH} levels")
        elif token in b"]}":
            depth -= 1


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:80]!r} appears twice")
            seen.add(key)
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")

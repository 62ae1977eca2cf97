"""Numbers of one dtype as numbers of another, in numpy, which knows no bfloat16."""

import numpy as np

NUMPY = {
    "bfloat16": "<u2",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "float8_e4m3": "u1",
    "uint8": "u1",
}
"""How the dtypes of an image are held: bfloat16 and float8_e4m3 as bit patterns."""


def convert(source: np.ndarray, source_dtype: str, dest_dtype: str) -> np.ndarray:
    """Widening is exact; narrowing rounds to nearest even, by way of float32 (as torch does)."""
    if source_dtype == dest_dtype:
        return source
    if source_dtype == "bfloat16":
        source = (source.astype(np.uint32) << 16).view(np.float32)
    if dest_dtype == "bfloat16":
        return _round_to_bfloat16(source)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are values here
        return source.astype(NUMPY[dest_dtype])


def _round_to_bfloat16(source: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        wide = np.ascontiguousarray(source, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(wide), np.uint32(0x7FC0), rounded).astype(np.uint16)

"""Building the packed weight image (see `layout` for its format) from a checkpoint. numpy only."""

from collections.abc import Callable
from pathlib import Path

from weft.core.model import Architecture
from weft.models.layout import (
    FORMAT_VERSION,
    ImageLayout,
    LayoutExtent,
    TensorEntry,
    image_layout,
)
from weft.models.safetensors_file import Checkpoint

__all__ = [
    "FORMAT_VERSION",
    "ImageLayout",
    "LayoutExtent",
    "TensorEntry",
    "build_image",
    "expected_tensors",
    "image_key",
    "image_layout",
]


def expected_tensors(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes a checkpoint of `arch` must have."""
    raise NotImplementedError


def image_key(path: Path, arch: Architecture) -> str:
    """Content address of the image: 64 hex digits of blake2b over the format version, `arch`, and
    every shard's name, size, modification time and header. Reads headers only."""
    raise NotImplementedError


def build_image(
    checkpoint: Checkpoint,
    arch: Architecture,
    out: memoryview,
    progress: Callable[[int], None] | None = None,
    threads: int = 1,
) -> None:
    """Write the image into `out` (image_layout(arch).num_bytes or more; gaps are zeroed).

    `progress` is called with the bytes written since its last call, from the calling thread; the
    calls sum up to the image's size. Every tensor's presence and shape is checked before the
    first byte is written. Raises WeftError naming file and tensor.
    """
    raise NotImplementedError

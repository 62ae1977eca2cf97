"""Reading safetensors, sharded or not, without trusting them: numpy views over mmap.

Format: 8 bytes little-endian header length, JSON header, data (huggingface.co/docs/safetensors).
"""

from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np

from weft.core.model import DType


class TensorInfo(msgspec.Struct, frozen=True):
    """Where one tensor lies."""

    name: str
    file: int
    """Index into Checkpoint.files."""
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    num_bytes: int


class Checkpoint:
    """An opened checkpoint: every header checked, data mapped. Use as a context manager; arrays
    must be gone before it is closed."""

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]

    def array(self, name: str) -> np.ndarray:
        """Read-only view of a tensor's data; bfloat16 comes as uint16 bit patterns."""
        raise NotImplementedError

    def main_dtype(self) -> DType:
        """The dtype most of the stored bytes have."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the safetensors of a model folder: model.safetensors.index.json with its shards, or
    model.safetensors. Raises WeftError naming the file, whatever is wrong with it."""
    raise NotImplementedError

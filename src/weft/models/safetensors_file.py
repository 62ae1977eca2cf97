"""Reading safetensors, sharded or not, without trusting them: plain reads, no mapping (reading a
mapping behind the end of a file that shrank would end the process).

Format: 8 bytes little-endian header length, JSON header, data (huggingface.co/docs/safetensors).
"""

import os
import re
import stat
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, get_args

import msgspec
import numpy as np

from weft.core.errors import WeftError
from weft.core.model import DType
from weft.models.json_file import parse_object, read_json

MAX_HEADER_BYTES = 16 << 20
"""Of one file; a header of 100,000 tensors has 10 MB. Parsed it takes twenty times as much."""
MAX_HEADERS_BYTES = 64 << 20
"""Of all files of a checkpoint together."""
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 1024
MAX_DIMS = 8
MAX_NAME_CHARS = 512
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3",
    "I32": "int32",
    "I64": "int64",
}
_NUMPY = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4", "float64": "<f8"}
_NUMPY |= {"float8_e4m3": "u1", "int32": "<i4", "int64": "<i8"}
_BYTES = {name: np.dtype(code).itemsize for name, code in _NUMPY.items()}
_OTHER_DTYPES = (
    {"BOOL", "U8", "I8", "U16", "I16", "U32", "U64", "C64"}
    | {"F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
    | {"F4", "F6_E2M3", "F6_E3M2"}
)


class TensorInfo(msgspec.Struct, frozen=True):
    """Where one tensor lies."""

    name: str
    file: int
    """Index into Checkpoint.files."""
    dtype: str
    """A DType, or of quantized weights: float8_e4m3, int32, int64."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    num_bytes: int


class _Shard(NamedTuple):
    path: Path
    fd: int
    num_bytes: int
    mtime_ns: int
    header: bytes
    tensors: dict[str, TensorInfo]


class ShardStamp(NamedTuple):
    """What identifies a shard's content without reading it."""

    name: str
    num_bytes: int
    mtime_ns: int
    header: bytes


class Checkpoint:
    """An opened checkpoint: every header checked. Use as a context manager; any thread may read."""

    def __init__(self, path: Path, shards: list[_Shard], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.files = tuple(shard.path for shard in shards)
        self.tensors = tensors
        self._shards = shards

    def array(self, name: str) -> np.ndarray:
        """A tensor's data; bfloat16 and float8_e4m3 come as bit patterns (uint16, uint8). Raises
        WeftError if the file is no longer what it was."""
        info = self._info(name)
        array = np.empty(info.shape, dtype=_NUMPY[info.dtype])
        self._read(info, 0, array)
        return array

    def rows(self, name: str, first: int, count: int) -> np.ndarray:
        """Indices first .. first + count - 1 of a tensor's first axis, as `array` gives them."""
        info = self._info(name)
        array = np.empty((count, *info.shape[1:]), dtype=_NUMPY[info.dtype])
        self.read_rows(name, first, array)
        return array

    def read_rows(self, name: str, first: int, out: np.ndarray) -> None:
        """The same into `out`, which is contiguous: as many bytes as it has."""
        info = self._info(name)
        self._read(info, first * (info.num_bytes // max(1, info.shape[0])), out)

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise WeftError(f"{self.path}: tensor {name!r} is missing from the checkpoint")
        return info

    def _read(self, info: TensorInfo, skip: int, out: np.ndarray) -> None:
        if skip + out.nbytes > info.num_bytes:
            raise ValueError(f"{info.name}: {skip} + {out.nbytes} bytes of {info.num_bytes}")
        shard = self._shards[info.file]
        view = memoryview(out.reshape(-1).view(np.uint8))
        at = 0
        while at < len(view):
            try:
                got = os.preadv(shard.fd, [view[at:]], info.offset + skip + at)
            except OSError as error:
                raise WeftError(f"{shard.path}: cannot be read: {error}") from None
            if got == 0:
                raise WeftError(
                    f"{shard.path}: became shorter while it was read; download it again"
                )
            at += got

    def file_of(self, name: str) -> Path:
        """The shard a tensor lies in, for error messages."""
        return self.files[self.tensors[name].file]

    def main_dtype(self) -> DType:
        """The dtype most of the stored bytes have, quantized weights aside."""
        count: Counter[DType] = Counter()
        for info in self.tensors.values():
            for dtype in get_args(DType):
                if info.dtype == dtype:
                    count[dtype] += info.num_bytes
        if not count:
            raise WeftError(f"{self.path}: the checkpoint holds no tensors of a floating dtype")
        return max(count, key=lambda dtype: count[dtype])

    def stamps(self) -> tuple[ShardStamp, ...]:
        """One a shard, in order of name."""
        return tuple(
            ShardStamp(shard.path.name, shard.num_bytes, shard.mtime_ns, shard.header)
            for shard in sorted(self._shards, key=lambda shard: shard.path.name)
        )

    def will_need(self, name: str) -> None:
        """Ask the kernel to read a tensor ahead."""
        info = self.tensors[name]
        os.posix_fadvise(
            self._shards[info.file].fd, info.offset, info.num_bytes, os.POSIX_FADV_WILLNEED
        )

    def close(self) -> None:
        """Close the files. Nothing can be read afterwards."""
        while self._shards:
            os.close(self._shards.pop().fd)

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
    path = Path(path)
    weight_map = _read_index(path)
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    shards: list[_Shard] = []
    tensors: dict[str, TensorInfo] = {}
    left = MAX_HEADERS_BYTES
    try:
        for number, name in enumerate(names):
            shard = _open_shard(path / name, number, left)
            shards.append(shard)
            left -= len(shard.header)
            for tensor, info in shard.tensors.items():
                if tensor in tensors:
                    other = shards[tensors[tensor].file].path.name
                    raise WeftError(f"{shard.path}: tensor {tensor!r} is also in {other}")
                tensors[tensor] = info
        for tensor, name in (weight_map or {}).items():
            if tensor not in tensors or names[tensors[tensor].file] != name:
                raise WeftError(
                    f"{path / INDEX}: tensor {tensor[:200]!r} is not in {name}; download it again"
                )
    except BaseException:
        for shard in shards:
            os.close(shard.fd)
        raise
    return Checkpoint(path, shards, tensors)


def open_tensors(file: Path) -> Checkpoint:
    """Open one safetensors file by itself (an adapter's). Raises WeftError naming the file."""
    file = Path(file)
    shard = _open_shard(file, 0, MAX_HEADER_BYTES)
    return Checkpoint(file, [shard], shard.tensors)


def _read_index(path: Path) -> dict[str, str] | None:
    """weight_map of a sharded checkpoint, None for a single file."""
    index = path / INDEX
    try:
        sharded, single = index.is_file(), (path / SINGLE).is_file()
        foreign = any(path.glob("pytorch_model*.bin")) if path.is_dir() else False
    except (OSError, ValueError) as error:
        raise WeftError(f"{path}: cannot be read: {error}") from None
    if not sharded:
        if not single:
            hint = (
                "only pytorch_model.bin, which is never unpickled here; convert it to safetensors"
                if foreign
                else f"neither {SINGLE} nor {INDEX}; is this a Hugging Face model folder?"
            )
            raise WeftError(f"{path}: {hint}")
        return None
    weight_map = read_json(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeftError(f"{index}: `weight_map` must be an object of tensor names to shards")
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise WeftError(
                f"{index}: shard name {str(name)[:80]!r} is not a plain *.safetensors file name"
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise WeftError(f"{index}: more than {MAX_SHARDS} shards")
    return weight_map


def _open_shard(path: Path, number: int, header_left: int) -> _Shard:
    """Open a file and check its header. Links are followed (hub caches consist of them), devices
    and pipes are not read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise WeftError(f"{path}: cannot be read: {error}") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise WeftError(f"{path}: not a regular file")
        if info.st_size < 8:
            raise WeftError(f"{path}: {info.st_size} bytes is no safetensors file; truncated?")
        header, data_start = _header_bytes(path, fd, info.st_size, header_left)
        raw = parse_object(header, f"{path}: header")
        tensors = _parse_tensors(path, number, raw, data_start, info.st_size)
    except OSError as error:
        os.close(fd)
        raise WeftError(f"{path}: cannot be read: {error}") from None
    except BaseException:
        os.close(fd)
        raise
    return _Shard(path, fd, info.st_size, info.st_mtime_ns, header, tensors)


def _header_bytes(path: Path, fd: int, file_bytes: int, header_left: int) -> tuple[bytes, int]:
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > MAX_HEADER_BYTES:
        raise WeftError(f"{path}: header length {length} is absurd; not a safetensors file?")
    if 8 + length > file_bytes:
        raise WeftError(
            f"{path}: header ends at {8 + length}, the file at {file_bytes}; truncated?"
        )
    if length > header_left:
        raise WeftError(f"{path}: more than {MAX_HEADERS_BYTES} bytes of headers in one checkpoint")
    header = os.pread(fd, length, 8)
    if not header.startswith(b"{"):
        raise WeftError(f"{path}: header does not begin with '{{'; not a safetensors file?")
    return header, 8 + length


def _parse_tensors(
    path: Path, number: int, raw: dict[str, Any], data_start: int, file_bytes: int
) -> dict[str, TensorInfo]:
    raw.pop("__metadata__", None)
    tensors = {
        name: _parse_tensor(path, number, name, entry, data_start, file_bytes)
        for name, entry in raw.items()
    }
    end, before = data_start, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.num_bytes)):
        if info.offset < end:
            raise WeftError(f"{path}: tensor {info.name!r} overlaps {before}")
        end, before = info.offset + info.num_bytes, repr(info.name)
    return tensors


def _parse_tensor(
    path: Path, number: int, name: str, entry: Any, data_start: int, file_bytes: int
) -> TensorInfo:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or len(name) > MAX_NAME_CHARS:
        raise WeftError(f"{where}: malformed header entry")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        known = isinstance(dtype, str) and dtype in _OTHER_DTYPES
        what = dtype if known else f"{str(dtype)[:40]!r}"
        raise WeftError(f"{where}: dtype {what} is not supported; supported: {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_size, shape)):
        raise WeftError(f"{where}: shape must be at most {MAX_DIMS} integers of 0 or more")
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_size, span)):
        raise WeftError(f"{where}: data_offsets must be two integers of 0 or more")
    num_bytes = _BYTES[_DTYPES[dtype]]
    for size in shape:
        num_bytes *= size
    if span[1] - span[0] != num_bytes:
        raise WeftError(
            f"{where}: data_offsets span {span[1] - span[0]} bytes, "
            f"{dtype} {shape} needs {num_bytes}"
        )
    if data_start + span[1] > file_bytes:
        raise WeftError(
            f"{where}: ends at byte {data_start + span[1]}, the file at {file_bytes}; "
            "truncated? download it again"
        )
    return TensorInfo(
        name=name,
        file=number,
        dtype=_DTYPES[dtype],
        shape=tuple(shape),
        offset=data_start + span[0],
        num_bytes=num_bytes,
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62

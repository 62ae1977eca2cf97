"""Building the packed weight image (see `layout` for its format) from a checkpoint. numpy only.

The work is cut into pieces of a few MiB that any number of threads may do: numpy lets go of the
interpreter while it reads and copies. Rows of the image's own dtype are read to where they belong;
transposes go tile by tile, so that both sides stay in the cache.

Shape legend: H hidden size, Q query heads, G KV heads, D head dim, I intermediate size, V
vocabulary.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from weft.core.errors import WeftError
from weft.core.model import DTYPE_BYTES, Architecture
from weft.models.convert import NUMPY, convert
from weft.models.layout import (
    FORMAT_VERSION,
    ImageLayout,
    LayoutExtent,
    TensorEntry,
    image_layout,
)
from weft.models.names import expected_tensors, sources, tensor_name
from weft.models.quant_image import QuantPart, QuantWork, quant_modules, quant_parts
from weft.models.quant_layout import is_quantized
from weft.models.safetensors_file import Checkpoint, open_checkpoint

__all__ = [
    "FORMAT_VERSION",
    "ImageLayout",
    "LayoutExtent",
    "TensorEntry",
    "build_image",
    "convert",
    "expected_tensors",
    "image_key",
    "image_layout",
]

PIECE_BYTES = 4 << 20
TILE = (512, 32)
"""Rows and columns of the image that a transpose does at a time: 32 columns are 32 lines of the
source, few enough even where its rows lie a power of two apart; tall, because every tile costs a
call."""


class _Piece(NamedTuple):
    """Rows of a tensor of the checkpoint and where they go; `tensor` "" means zeros."""

    tensor: str
    first_row: int
    num_rows: int
    dest: np.ndarray
    transposed: bool = False


def check_tensors(checkpoint: Checkpoint, arch: Architecture) -> None:
    """Raises WeftError for the first tensor that is missing or has another shape or dtype than
    config.json asks for. Reads headers only."""
    quantized = quant_modules(checkpoint, arch)
    for name, shape in expected_tensors(arch).items():
        module = quantized.get(name.removesuffix(".weight"))
        if module is not None and name.endswith(".weight"):
            module.check_headers()
            continue
        info = checkpoint.tensors.get(name)
        if info is None:
            raise WeftError(f"{checkpoint.path}: tensor {name!r} is missing from the checkpoint")
        if info.shape != shape:
            raise WeftError(
                f"{checkpoint.file_of(name)}: tensor {name!r} has shape {list(info.shape)}, "
                f"config.json asks for {list(shape)}"
            )
        if info.dtype not in DTYPE_BYTES:
            raise WeftError(
                f"{checkpoint.file_of(name)}: tensor {name!r} is stored as {info.dtype}, which "
                "config.json's quantization_config does not account for; supported without: "
                f"{', '.join(DTYPE_BYTES)}"
            )


def _check_tied(checkpoint: Checkpoint, arch: Architecture) -> None:
    """A head of its own beside embeddings that config.json ties it to: transformers uses it where
    it differs, and the image has no place for it. Raises WeftError then."""
    embed, head = tensor_name(arch, "embed"), tensor_name(arch, "lm_head")
    if not arch.tied_embeddings or head not in checkpoint.tensors:
        return
    ours, theirs = checkpoint.tensors[embed], checkpoint.tensors[head]
    step = max(1, PIECE_BYTES // (ours.num_bytes // ours.shape[0]))
    same = (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) and all(
        np.array_equal(*(checkpoint.rows(name, at, count) for name in (embed, head)))
        for at in range(0, ours.shape[0], step)
        for count in [min(step, ours.shape[0] - at)]
    )
    if not same:
        raise WeftError(
            f"{checkpoint.file_of(head)}: {head!r} differs from the embeddings, but config.json "
            "ties them; set `tie_word_embeddings` to false in config.json"
        )


def image_key(path: Path, arch: Architecture) -> str:
    """Content address of the image: 64 hex digits of blake2b over the format version, `arch`, and
    every shard's name, size, modification time and header. Reads headers only."""
    digest = hashlib.blake2b(digest_size=32)
    with open_checkpoint(path) as checkpoint:
        for part in (str(FORMAT_VERSION).encode(), msgspec.json.encode(arch)):
            digest.update(len(part).to_bytes(8, "little") + part)
        for stamp in checkpoint.stamps():
            facts = f"{stamp.name}\0{stamp.num_bytes}\0{stamp.mtime_ns}".encode()
            for part in (facts, stamp.header):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


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
    first byte is written, and that scales are finite. Raises WeftError naming file and tensor.
    """
    layout = image_layout(arch)
    report = progress or _ignore
    if out.nbytes < layout.num_bytes:
        raise ValueError(f"the image needs {layout.num_bytes} bytes, got {out.nbytes}")
    check_tensors(checkpoint, arch)
    _check_tied(checkpoint, arch)
    for module in quant_modules(checkpoint, arch).values():
        module.check_values()
    image = np.frombuffer(out, dtype=np.uint8, count=layout.num_bytes)
    report(_zero_gaps(image, layout))
    pieces = _pieces(checkpoint, arch, layout, image)
    if threads <= 1:
        for piece in pieces:
            report(_copy(checkpoint, arch.dtype, piece))
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="weft-image") as pool:
        window: deque[Future[int]] = deque()
        for piece in pieces:
            window.append(pool.submit(_copy, checkpoint, arch.dtype, piece))
            if len(window) >= 4 * threads:
                report(window.popleft().result())
        for future in window:
            report(future.result())


def _ignore(_: int) -> None:
    """Nobody watches."""


def _zero_gaps(image: np.ndarray, layout: ImageLayout) -> int:
    """Zero what no tensor covers; returns how many bytes that is."""
    at = total = 0
    for entry in sorted(layout.tensors.values(), key=lambda entry: entry.offset):
        image[at : entry.offset] = 0
        total += entry.offset - at
        at = entry.offset + entry.num_bytes
    image[at:] = 0
    return total + layout.num_bytes - at


def _pieces(
    checkpoint: Checkpoint, arch: Architecture, layout: ImageLayout, image: np.ndarray
) -> Iterator[_Piece | QuantWork]:
    """Every byte of every tensor of the image, once; nearly in image order."""

    def dest(name: str) -> np.ndarray:
        entry = layout.tensors[name]
        raw = image[entry.offset : entry.offset + entry.num_bytes]
        return raw.view(NUMPY[entry.dtype]).reshape(entry.shape)

    places, modules = sources(arch), quant_modules(checkpoint, arch)

    def cut(target: np.ndarray, part: str, *, transpose: bool = False) -> Iterator[_Piece]:
        name, first, shape = places[part]
        checkpoint.will_need(name)
        if transpose:
            return _cut_transposed(name, first, target)
        return _cut(name, first, target, target.ndim - len(shape) + 1)

    vocab, group, dim = arch.vocab_size, arch.group_size, arch.head_dim
    rows_of = {
        "q": slice(0, group * dim),
        "k": slice(group * dim, (group + 1) * dim),
        "v": slice((group + 1) * dim, (group + 2) * dim),
    }
    for name in layout.tensors:
        target = dest(name)
        layer, _, own = name.rpartition(".")
        if is_quantized(arch, name):
            zero = dest(f"{name}.zero") if f"{name}.zero" in layout.tensors else None
            tensors = (target, dest(f"{name}.scale"), zero)
            for part in quant_parts(modules, places, name, tensors, rows_of):
                yield from _quant_pieces(part, layout.tensors[f"{name}.scale"].dtype)
        elif own in ("scale", "zero"):
            continue  # done with their matrix
        elif own in ("embed", "lm_head"):
            yield from _padding(target[vocab:])
            yield from cut(target[:vocab], name)
        elif own in ("qkv", "qkv_bias"):
            for own_part, rows in rows_of.items():
                yield from cut(target[:, rows], f"{layer}.{own_part}{own[3:]}")
        elif own in ("gate_up", "gate_up_bias"):
            for half, own_part in enumerate(("gate", "up")):
                yield from cut(target[:, half], f"{layer}.{own_part}{own[7:]}")
        else:
            yield from cut(target, name, transpose=own in ("o", "down"))


def _quant_pieces(part: QuantPart, scale_dtype: str) -> Iterator[_Piece | QuantWork]:
    """A part of a quantized matrix: its weights, its zero points, its scales."""
    part.module.read_ahead()
    if part.zero is not None:
        yield from part.packing()
        yield part.write_zeros
    elif part.transposed:
        yield from _cut_transposed(part.module.weight, part.rows.start, part.weight)
    else:
        yield from _cut(part.module.weight, part.rows.start, part.weight, part.weight.ndim - 1)
    yield partial(part.write_scales, scale_dtype)


def _padding(target: np.ndarray) -> Iterator[_Piece]:
    """Zero rows after the vocabulary."""
    if target.size:
        yield _Piece("", 0, len(target), target)


def _cut(name: str, first: int, dest: np.ndarray, row_axes: int) -> Iterator[_Piece]:
    """Pieces of about PIECE_BYTES. The first `row_axes` axes of dest count the tensor's rows."""
    if row_axes > 1:
        rows = int(np.prod(dest.shape[1:row_axes]))
        for i in range(dest.shape[0]):
            yield from _cut(name, first + i * rows, dest[i], row_axes - 1)
        return
    step = max(1, PIECE_BYTES // max(1, dest[:1].nbytes))
    for at in range(0, dest.shape[0], step):
        part = dest[at : at + step]
        yield _Piece(name, first + at, len(part), part)


def _cut_transposed(name: str, first: int, dest: np.ndarray) -> Iterator[_Piece]:
    """Pieces along the second axis of dest, which counts the tensor's rows."""
    step = max(1, PIECE_BYTES // max(1, dest[:, :1].nbytes))
    if step > TILE[1]:
        step -= step % TILE[1]
    for at in range(0, dest.shape[1], step):
        part = dest[:, at : at + step]
        yield _Piece(name, first + at, part.shape[1], part, transposed=True)


def _copy(checkpoint: Checkpoint, dtype: str, piece: _Piece | QuantWork) -> int:
    """Do one piece; returns the bytes written."""
    if not isinstance(piece, _Piece):
        return piece()
    name, first, count, dest, transposed = piece
    if not name:
        dest[...] = 0
        return dest.nbytes
    source_dtype = checkpoint.tensors[name].dtype
    if source_dtype == "float8_e4m3":
        dtype = source_dtype  # quantized weights go as they are
    if source_dtype == dtype and dest.flags.c_contiguous and not transposed:
        checkpoint.read_rows(name, first, dest)
    elif transposed:
        _copy_tiles(checkpoint.rows(name, first, count).T, source_dtype, dest, dtype)
    else:
        rows = checkpoint.rows(name, first, count)
        dest[...] = convert(rows.reshape(dest.shape), source_dtype, dtype)
    return dest.nbytes


def _copy_tiles(source: np.ndarray, source_dtype: str, dest: np.ndarray, dtype: str) -> None:
    (rows, columns), (height, width) = dest.shape, TILE
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            tile = (slice(row, row + height), slice(column, column + width))
            dest[tile] = convert(source[tile], source_dtype, dtype)

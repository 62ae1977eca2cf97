"""Which bytes go where: host store <-> device ranges. Planning is pure; copying is torch.

Pieces are as few and as long as adjacency allows, and none crosses a multiple of `chunk_bytes` on
the host side: chunks are registered with the device one by one, and a copy over the border of two
registrations fails.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch

from weft.core.request import Extent
from weft.memory.host_store import HostStore


class Piece(NamedTuple):
    """One contiguous copy. `device_offset` counts from the beginning of the model's range."""

    host_offset: int
    device_offset: int
    num_bytes: int


def kv_pieces(
    pages: Sequence[int], page_bytes: int, extents: Sequence[Extent], chunk_bytes: int
) -> tuple[Piece, ...]:
    """Copies between KV pages and host extents: page i is bytes i * page_bytes .. of the
    concatenated extents.

    Extents may end inside a page; what they hold beyond the last page is left alone. Raises
    ValueError if they are too short or empty, or a page id is negative.
    """
    if any(page < 0 for page in pages):
        raise ValueError(f"negative page id among {tuple(pages)}")
    return _join(_fragments(pages, page_bytes, extents), chunk_bytes)


def page_fragments(
    num_pages: int, page_bytes: int, extents: Sequence[Extent]
) -> list[tuple[Extent, ...]]:
    """Where each page lies in the host store: the parts of extents that hold it, in order."""
    places: list[list[Extent]] = [[] for _ in range(num_pages)]
    for piece in _fragments(range(num_pages), page_bytes, extents):
        places[piece.device_offset // page_bytes].append(Extent(piece.host_offset, piece.num_bytes))
    return [tuple(place) for place in places]


def range_pieces(
    host_offset: int, device_offset: int, num_bytes: int, chunk_bytes: int, max_bytes: int = 0
) -> tuple[Piece, ...]:
    """One contiguous range, cut at the host's chunk borders and, if given, into `max_bytes`."""
    pieces = _join([Piece(host_offset, device_offset, num_bytes)], chunk_bytes)
    if not max_bytes:
        return pieces
    return tuple(
        Piece(p.host_offset + at, p.device_offset + at, min(max_bytes, p.num_bytes - at))
        for p in pieces
        for at in range(0, p.num_bytes, max_bytes)
    )


def total_bytes(pieces: Iterable[Piece]) -> int:
    return sum(piece.num_bytes for piece in pieces)


def host_tensor(host: HostStore) -> torch.Tensor:
    """uint8 over the whole host store, without a copy. It holds the mapping: the store can be
    closed only after the tensor is gone."""
    return torch.frombuffer(host.buffer, dtype=torch.uint8)


def copy_pieces(
    pieces: Iterable[Piece],
    host: torch.Tensor,
    device: torch.Tensor,
    to: Literal["host", "device"],
) -> int:
    """Copy on the calling thread (CPU) and return the bytes copied.

    `host` and `device` are uint8 tensors over the host store and the model's range.
    """
    copied = 0
    for piece in pieces:
        on_host = host[piece.host_offset : piece.host_offset + piece.num_bytes]
        on_device = device[piece.device_offset : piece.device_offset + piece.num_bytes]
        if len(on_host) != piece.num_bytes or len(on_device) != piece.num_bytes:
            raise ValueError(f"{piece} is outside the host store or the range")
        if to == "host":
            on_host.copy_(on_device)
        else:
            on_device.copy_(on_host)
        copied += piece.num_bytes
    return copied


def _fragments(pages: Iterable[int], page_bytes: int, extents: Sequence[Extent]) -> list[Piece]:
    """Per page the parts of extents that hold it, in order."""
    fragments: list[Piece] = []
    index, used = 0, 0
    for page in pages:
        filled = 0
        while filled < page_bytes:
            if index >= len(extents):
                held = sum(extent.num_bytes for extent in extents)
                raise ValueError(f"extents hold {held} bytes, too few for pages of {page_bytes}")
            extent = extents[index]
            if extent.num_bytes <= 0 or extent.offset < 0:
                raise ValueError(f"not a byte range: {extent}")
            length = min(page_bytes - filled, extent.num_bytes - used)
            fragments.append(Piece(extent.offset + used, page * page_bytes + filled, length))
            filled += length
            used += length
            if used == extent.num_bytes:
                index, used = index + 1, 0
    return fragments


def _join(fragments: Iterable[Piece], chunk_bytes: int) -> tuple[Piece, ...]:
    """Join what is adjacent on both sides, then cut at the host's chunk borders."""
    joined: list[Piece] = []
    for part in fragments:
        if joined:
            last = joined[-1]
            if (
                last.host_offset + last.num_bytes == part.host_offset
                and last.device_offset + last.num_bytes == part.device_offset
            ):
                joined[-1] = last._replace(num_bytes=last.num_bytes + part.num_bytes)
                continue
        joined.append(part)
    pieces: list[Piece] = []
    for host_offset, device_offset, num_bytes in joined:
        while num_bytes > 0:
            length = min(num_bytes, chunk_bytes - host_offset % chunk_bytes)
            pieces.append(Piece(host_offset, device_offset, length))
            host_offset, device_offset = host_offset + length, device_offset + length
            num_bytes -= length
    return tuple(pieces)

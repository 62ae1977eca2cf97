"""Copy plans move every byte to its place, in few pieces, across no chunk border."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.core.request import Extent
from weft.engine.copies import (
    Piece,
    copy_pieces,
    kv_pieces,
    page_fragments,
    range_pieces,
    total_bytes,
)

CHUNK = 64


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[int], list[Extent]]:
    """Page size, page ids, and disjoint extents (none over a chunk border) that hold them."""
    page_bytes = draw(st.sampled_from([8, 24, 40, 96]))
    pages = draw(st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=6))
    left = page_bytes * len(pages)
    extents: list[Extent] = []
    at = draw(st.integers(0, 40))
    while left:
        length = draw(st.integers(1, min(left, CHUNK - at % CHUNK)))
        extents.append(Extent(at, length))
        at += length + draw(st.sampled_from([0, 0, 3, 50]))
        left -= length
    order = draw(st.permutations(extents))
    return page_bytes, pages, order


@given(layouts())
def test_there_and_back(layout: tuple[int, list[int], list[Extent]]) -> None:
    page_bytes, pages, extents = layout
    device = torch.randint(0, 255, (10 * page_bytes,), dtype=torch.uint8)
    host = torch.full((4096,), 255, dtype=torch.uint8)
    pieces = kv_pieces(pages, page_bytes, extents, CHUNK)
    assert copy_pieces(pieces, host, device, "host") == page_bytes * len(pages)
    concatenated = torch.cat([host[e.offset : e.offset + e.num_bytes] for e in extents])
    wanted = torch.cat([device[p * page_bytes : (p + 1) * page_bytes] for p in pages])
    assert torch.equal(concatenated, wanted)
    assert int((host != 255).sum()) == int((wanted != 255).sum()), "nothing else was touched"
    back = torch.zeros_like(device)
    copy_pieces(pieces, host, back, "device")
    for page in range(10):
        inside = slice(page * page_bytes, (page + 1) * page_bytes)
        want = device[inside] if page in pages else torch.zeros(page_bytes, dtype=torch.uint8)
        assert torch.equal(back[inside], want)


@given(layouts())
def test_pieces_are_joined_and_cut_at_chunks(
    layout: tuple[int, list[int], list[Extent]],
) -> None:
    page_bytes, pages, extents = layout
    pieces = kv_pieces(pages, page_bytes, extents, CHUNK)
    assert total_bytes(pieces) == page_bytes * len(pages)
    for piece in pieces:
        assert piece.num_bytes > 0
        assert piece.host_offset // CHUNK == (piece.host_offset + piece.num_bytes - 1) // CHUNK
    for a, b in itertools.pairwise(pieces):
        touching = (a.host_offset + a.num_bytes, a.device_offset + a.num_bytes) == (b[0], b[1])
        assert not touching or b.host_offset % CHUNK == 0
    places = page_fragments(len(pages), page_bytes, extents)
    assert [sum(e.num_bytes for e in place) for place in places] == [page_bytes] * len(pages)


def test_adjacent_pages_are_one_copy() -> None:
    assert kv_pieces([3, 4, 5, 1], 100, [Extent(1000, 400)], 1 << 20) == (
        Piece(1000, 300, 300),
        Piece(1300, 100, 100),
    )


def test_extents_may_be_longer_but_not_shorter() -> None:
    assert total_bytes(kv_pieces([0], 100, [Extent(0, 4096)], 1 << 20)) == 100
    with pytest.raises(ValueError, match="too few"):
        kv_pieces([0, 1], 100, [Extent(0, 199)], 1 << 20)
    with pytest.raises(ValueError, match="negative"):
        kv_pieces([-1], 100, [Extent(0, 100)], 1 << 20)
    with pytest.raises(ValueError, match="byte range"):
        kv_pieces([0], 100, [Extent(0, 0), Extent(0, 100)], 1 << 20)


def test_a_range_is_cut_at_chunks_and_at_a_size() -> None:
    assert range_pieces(60, 0, 140, CHUNK) == (
        Piece(60, 0, 4),
        Piece(64, 4, 64),
        Piece(128, 68, 64),
        Piece(192, 132, 8),
    )
    assert range_pieces(0, 7, 20, CHUNK, max_bytes=8) == (
        Piece(0, 7, 8),
        Piece(8, 15, 8),
        Piece(16, 23, 4),
    )
    assert range_pieces(5, 5, 0, CHUNK) == ()


def test_a_copy_outside_is_refused() -> None:
    host, device = torch.zeros(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    for piece in (Piece(5, 0, 6), Piece(0, 5, 6)):
        with pytest.raises(ValueError, match="outside"):
            copy_pieces([piece], host, device, "host")

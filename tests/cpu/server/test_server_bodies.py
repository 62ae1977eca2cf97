"""Bodies: what all of them together may take, and the shape of their JSON."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from weft.server.bodies import MAX_CONTAINERS, MAX_DEPTH, MAX_MEMBERS, Bodies, check_json_shape
from weft.server.errors import ApiError
from weft.server.visit import Visit


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "body",
    [
        nested(MAX_DEPTH),
        b"[" + b"[]," * (MAX_CONTAINERS - 2) + b"[]]",
        json.dumps({"text": "[{" * 100_000}).encode(),
        json.dumps({"text": '\\"[' * 100_000}).encode(),
        b'"' + b"[" * 1000,
        b"{" + b'"a:":1,' * (MAX_MEMBERS - 1) + b'"a":1}',
        b"]]]]",
    ],
)
def test_a_shape_within_the_bounds_is_left_to_the_parser(body: bytes) -> None:
    check_json_shape(body)


@pytest.mark.parametrize(
    "body",
    [
        nested(MAX_DEPTH + 1),
        nested(1_000_000),
        b'{"a":' * 100_000,
        b"[" + b"{}," * MAX_CONTAINERS + b"{}]",
        b"{" + b'"a":1,' * MAX_MEMBERS + b'"a":1}',
        b'"' + b"\\" * 7 + b'"' + nested(MAX_DEPTH + 1)[: MAX_DEPTH + 1] + b'"' + nested(200),
    ],
)
def test_a_shape_beyond_them_is_refused_unparsed(body: bytes) -> None:
    with pytest.raises(ApiError, match="nested deeper") as error:
        check_json_shape(body)
    assert error.value.status == 400


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


VALUES = st.recursive(
    st.none() | st.text("[]{}\\\"'a", max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("[{\\", max_size=3), inner),
    max_leaves=30,
)


@given(VALUES, st.integers(0, 6))
def test_brackets_in_texts_do_not_count(value: Any, limit: int) -> None:
    from weft.server import bodies

    plain = bodies.MAX_DEPTH
    bodies.MAX_DEPTH = limit  # type: ignore[misc]
    try:
        if depth_of(value) <= limit:
            check_json_shape(json.dumps(value).encode())
        else:
            with pytest.raises(ApiError):
                check_json_shape(json.dumps(value).encode())
    finally:
        bodies.MAX_DEPTH = plain  # type: ignore[misc]


def test_all_bodies_together_are_bounded() -> None:
    bodies = Bodies(200 << 20)  # two of them

    async def receive() -> Message:
        return {"type": "http.request", "body": bytes(150 << 20), "more_body": True}

    async def scenario() -> None:
        visits = [Visit(request_id=str(i), arrival_s=0.0) for i in range(3)]
        for visit in visits[:2]:
            await bodies.counting(receive, visit)()
        with pytest.raises(ApiError) as error:
            await bodies.counting(receive, visits[2])()
        assert (error.value.status, error.value.code) == (503, "too_many_bodies")
        bodies.release(visits[0])
        bodies.release(visits[0])
        await bodies.counting(receive, visits[2])()

    asyncio.run(scenario())

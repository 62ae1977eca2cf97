"""The memory that request bodies may take all together, and the shape of their JSON.

`server.max_body_bytes` bounds one body; a thousand of them at once would still be gigabytes.
"""

import re

from starlette.types import Message, Receive

from weft.server.errors import ApiError, bad_request
from weft.server.visit import Visit

LEAST_BUDGET_BYTES = 256 << 20
MAX_DEPTH = 64
MAX_CONTAINERS = 1 << 16
MAX_MEMBERS = 1 << 16
"""Of all objects together: a schema complains of every unknown one before anybody is told."""
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""Possessive: linear in whatever is sent. A string without its end reaches to the end."""
_NO_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))


class Bodies:
    """Counts the bytes of bodies from their arrival until what they ask for is in the hub."""

    def __init__(self, max_body_bytes: int) -> None:
        self._budget = max(LEAST_BUDGET_BYTES, 2 * max_body_bytes)
        self._held = 0

    def counting(self, receive: Receive, visit: Visit) -> Receive:
        """`receive`, which raises ApiError 503 when the bodies of all take too much memory."""

        async def counted() -> Message:
            message = await receive()
            size = len(message.get("body", b""))
            if self._held + size > self._budget:
                raise ApiError(
                    503,
                    "too many large requests at once",
                    code="too_many_bodies",
                    retry_after_s=1,
                    headers={"Connection": "close"},
                )
            self._held += size
            visit.body_bytes += size
            return message

        return counted

    def release(self, visit: Visit) -> None:
        """Its body is no longer held. Idempotent."""
        self._held -= visit.body_bytes
        visit.body_bytes = 0


def check_json_shape(body: bytes) -> None:
    """Bounds depth and number of lists, objects and members before any of them is made: two bytes
    of JSON can take a hundred of memory. Raises ApiError 400."""
    bare = _STRINGS.sub(b"", body)
    brackets = bare.translate(None, _NO_BRACKETS)
    containers = brackets.count(b"[") + brackets.count(b"{")
    members = bare.count(b":")
    depth = deepest = 0
    if containers <= MAX_CONTAINERS:
        for bracket in brackets:
            depth += 1 if bracket in b"[{" else -1
            deepest = max(deepest, depth)
    if containers > MAX_CONTAINERS or members > MAX_MEMBERS or deepest > MAX_DEPTH:
        raise bad_request(
            f"the body has more than {MAX_CONTAINERS} lists and objects, or more than "
            f"{MAX_MEMBERS} members of objects, or is nested deeper than {MAX_DEPTH}",
            code="invalid_json",
        )

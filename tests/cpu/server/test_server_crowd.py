"""Many clients at once, some of which leave: nothing is left behind."""

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.fake_hub import FakeHub, card, spoken
from support.live import live
from support.tiny import write_tokenizer
from weft.core.errors import QUEUE_FULL, ReplyError


@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends_or_is_cancelled(tmp_path: Path, seed: int) -> None:
    write_tokenizer(tmp_path, 300)
    chance = random.Random(seed)

    def script(new: Any) -> Any:
        if chance.random() < 0.1:
            return ReplyError(code=QUEUE_FULL, message="full")
        return spoken([9] * chance.randrange(1, 200), per_chunk=chance.randrange(1, 5))

    hub = FakeHub([card("m", tmp_path)], script)
    statuses: list[int] = []

    async def client(url: str, number: int) -> None:
        stream, leaves = number % 2 == 0, number % 3 == 0
        body = {"model": "m", "prompt": [[5], [6]], "max_tokens": 300, "stream": stream}
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            if not stream:
                statuses.append((await http.post("/v1/completions", json=body)).status_code)
                return
            async with http.stream("POST", "/v1/completions", json=body) as reply:
                statuses.append(reply.status_code)
                async for line in reply.aiter_lines():
                    if leaves and line:
                        return

    async def scenario() -> str:
        async with live(hub) as server:
            await asyncio.gather(*(client(server.url, n) for n in range(60)))
            async with httpx.AsyncClient(base_url=server.url) as http:
                text = (await http.get("/metrics")).text
            server.stop.set()
            await server.task  # with `grace_s` far away: it waits for what still lives
            return text

    asyncio.run(scenario())
    assert len(statuses) == 60
    assert set(statuses) == {200, 429}
    assert set(hub.ended) | set(hub.cancelled) == set(range(1, len(hub.opened) + 1))

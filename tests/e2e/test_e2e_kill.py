"""What survives kill -9: of a worker everything, of the server nothing."""

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.pool_process import PoolProcess, alive, poll, running_pool, stream_all, stream_text
from support.tiny import tiny_checkpoint

MODELS = ("ant", "bee", "cat")
STREAMS = 20
TOKENS = 60
BODY: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


def make_models(folder: Path) -> list[dict[str, Any]]:
    for seed, name in enumerate(MODELS):
        tiny_checkpoint(
            folder / name,
            seed=seed,
            dtype="float64",
            hidden=128,
            intermediate=256,
            vocab=256,
            family="qwen2" if name == "bee" else "llama",
        )
    return [{"name": name, "path": name} for name in MODELS]


def jobs() -> list[tuple[str, list[int]]]:
    rng = random.Random(5)
    return [
        (MODELS[i % 3], [rng.randrange(6, 256) for _ in range(rng.randrange(2, 40))])
        for i in range(STREAMS)
    ]


PROBATION = 2
"""Deaths in a row without a token after which one more fails a request."""
LOST = "state=lost"


class Progress:
    """What the clients saw of each stream, between the blows."""

    def __init__(self, streams: int) -> None:
        self.seen = 0
        """Pieces of text, of all streams."""
        self._bare = [0] * streams
        """Per stream, blows since its last piece."""
        self._open = set(range(streams))
        self._news = asyncio.Event()
        self.last_blow = False

    def begun(self, stream: int) -> None:
        """A request that no worker has died with yet."""
        self._bare[stream] = 0

    def arrived(self, stream: int) -> None:
        self.seen += 1
        self._bare[stream] = 0
        self._news.set()

    def ended(self, stream: int) -> None:
        self._open.discard(stream)
        self._news.set()

    def struck(self) -> None:
        """A worker died, and all that it had sent before has arrived."""
        self._bare = [blows + 1 for blows in self._bare]

    async def until(self, goal: int) -> None:
        """So many pieces have come, and no open stream could be one death from failing: on a slow
        machine a killer faster than the tokens would fail requests as the pool promises to."""
        while self._open and (
            self.seen < goal or any(self._bare[stream] >= PROBATION for stream in self._open)
        ):
            self._news.clear()
            await self._news.wait()

    @property
    def over(self) -> bool:
        return not self._open


async def kill_during(
    pool: PoolProcess, kills: int, seed: int, body: dict[str, Any] = BODY
) -> list[str]:
    """All streams, with the worker killed `kills` times while they run. One that ends before the
    last blow is asked for again, so that there is work at every blow however fast the machine is.
    """
    rng = random.Random(seed)
    progress = Progress(STREAMS)
    before = pool.log().count(LOST)

    async def one(client: Any, stream: int, model: str, prompt: list[int]) -> str:
        told: set[str] = set()
        try:
            while not (told and progress.last_blow):
                progress.begun(stream)
                told.add(
                    await stream_text(
                        client, model, prompt, on_text=lambda: progress.arrived(stream), **body
                    )
                )
        finally:
            progress.ended(stream)
        (text,) = told
        return text

    async with pool.client() as client:
        streams = [asyncio.create_task(one(client, i, *job)) for i, job in enumerate(jobs())]
        killed = 0
        while killed < kills and not progress.over:
            # A random amount of answer, counted from the last death, then the blow.
            await progress.until(progress.seen + rng.randrange(1, STREAMS * TOKENS // (3 * kills)))
            if not pool.kill_worker():
                continue
            killed += 1
            noticed = before + killed
            await asyncio.to_thread(
                poll, lambda noticed=noticed: pool.log().count(LOST) >= noticed, 30.0, pool
            )
            # What the dead worker had sent is with its clients before an answer asked for now.
            (await client.get("/weft/status")).raise_for_status()
            progress.struck()
        progress.last_blow = True
        return list(await asyncio.gather(*streams))


def nothing_is_held(pool: PoolProcess) -> bool:
    """The last report of the unit: no request, no KV page, no extent of the host store."""
    view = httpx.get(f"{pool.url}/weft/status").json()["pool"]
    (unit,) = view["units"]
    status = unit["status"]  # None: the last worker has just begun
    assert view["unfinished"] == 0
    return (
        status is not None
        and status["waiting"] == 0
        and status["host_used_bytes"] == 0
        and all(model["kv_pages_used"] == 0 for model in status["models"])
    )


@pytest.mark.parametrize(
    ("rounds", "kills"), [(1, 4), pytest.param(12, 5, marks=pytest.mark.slow, id="sixty kills")]
)
def test_streams_have_no_seam_when_the_worker_is_killed(
    tmp_path: Path, rounds: int, kills: int
) -> None:
    with running_pool(
        tmp_path, make_models(tmp_path), engine={"device_memory": "6M"}, turn_s=0.05
    ) as pool:
        pool.wait_ready()
        plain = asyncio.run(stream_all(pool, jobs(), **BODY))
        for seed in range(rounds):
            assert asyncio.run(kill_during(pool, kills, seed=seed)) == plain
        assert pool.log().count("state=lost reason=killed by signal 9") == rounds * kills
        poll(lambda: nothing_is_held(pool), 10.0, pool)
        assert pool.stop() == 0


def test_grammars_and_penalties_have_no_seam_either(tmp_path: Path) -> None:
    """A new worker knows only what was sent: it takes grammar and counts up from there."""
    stepwise = {"frequency_penalty": 0.4, "repetition_penalty": 1.2, "logprobs": 1}
    stepwise |= {"temperature": 0.9, "seed": 11, "structured_outputs": {"regex": "[a-h -]{300}"}}
    with running_pool(
        tmp_path, make_models(tmp_path), engine={"device_memory": "6M"}, turn_s=0.05
    ) as pool:
        pool.wait_ready()
        plain = asyncio.run(stream_all(pool, jobs(), **BODY | stepwise))
        # Some prompts end within a character; it shows in front of the answer.
        told = [text.lstrip("\ufffd") for text in plain]
        assert all({*text} <= {*"abcdefgh -"} and len(text) >= TOKENS for text in told)
        assert asyncio.run(kill_during(pool, 3, seed=1, body=BODY | stepwise)) == plain
        poll(lambda: nothing_is_held(pool), 10.0, pool)


def shared_memory() -> set[str]:
    place = Path("/dev/shm")
    return {entry.name for entry in place.iterdir()} if place.is_dir() else set()


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_an_end_of_the_server_is_the_end_of_everything(tmp_path: Path, sig: int) -> None:
    before = shared_memory()
    with running_pool(tmp_path, make_models(tmp_path)[:1]) as pool:
        pool.wait_ready()

        async def scenario() -> None:
            body = {"model": "ant", "prompt": [5], "stream": True, **BODY, "max_tokens": 400}
            async with (
                pool.client() as client,
                client.stream("POST", "/v1/completions", json=body) as response,
            ):
                lines = response.aiter_lines()
                await anext(lines)
                (worker,) = pool.worker_pids()
                os.kill(pool.process.pid, sig)
                if sig == signal.SIGTERM:  # the answer in flight is finished first
                    assert "data: [DONE]" in [line async for line in lines]
                status = await asyncio.to_thread(pool.process.wait, 30)
                assert status == (0 if sig == signal.SIGTERM else -sig)
                await asyncio.to_thread(poll, lambda: not alive(worker), 10.0)

        asyncio.run(scenario())
        assert list(pool.temp_dir.iterdir()) == []
        assert shared_memory() <= before

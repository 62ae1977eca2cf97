"""Promises 1, 3, 4 and 5 together, under everything at once: see `support.campaign`."""

import asyncio
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.campaign import (
    House,
    Tally,
    Wish,
    cached_bytes,
    count_traces,
    draw_wishes,
    live_in,
    make_models,
    nothing_is_held,
    open_house,
    store_facts,
    workers_of,
)
from support.pool_process import poll, stream_all

KIB = 1 << 10
NO_ROOM, LITTLE, PLENTY = 0, 1536 * KIB, 24 << 20
"""Host memory for parked KV: none, some 8 pages where 30 are wanted, more than is ever wanted."""


def shared_memory() -> set[str]:
    place = Path("/dev/shm")
    return {entry.name for entry in place.iterdir()} if place.is_dir() else set()


async def kill_everything(house: House) -> None:
    """kill -9 of the server while answers are on their way."""
    pool = house.pool
    body: dict[str, Any] = {"max_tokens": 300, "temperature": 0, "ignore_eos": True}
    jobs = [("ant", [7] * 9), ("bee", [8]), ("cat", [9] * 150)]
    streams = asyncio.create_task(stream_all(pool, jobs, **body))
    await asyncio.to_thread(poll, lambda: house.view()["unfinished"] == 3, 10.0, pool)
    assert workers_of(pool.process.pid)
    assert await asyncio.to_thread(pool.stop, signal.SIGKILL) == -signal.SIGKILL
    (torn,) = await asyncio.gather(streams, return_exceptions=True)
    assert isinstance(torn, Exception), "the answers were over before the blow"


def house_of_fire(
    folder: Path,
    models: Sequence[dict[str, Any]],
    wishes: Sequence[Wish],
    rng: random.Random,
    *,
    parked_bytes: int,
    switches: int,
    kills: int,
) -> Tally:
    """One pool from its start to its violent end, with all that must hold."""
    before = shared_memory()
    begin_s = time.monotonic()
    with open_house(folder, models, parked_bytes) as house:
        at_start = store_facts(house)
        asyncio.run(live_in(house, wishes, rng, switches=switches, kills=kills))
        assert house.wrong == []
        poll(lambda: nothing_is_held(house), 20.0, house.pool)
        # `check` is on: with nothing in flight the worker has compared ledger and arena, or died.
        assert house.deaths() == ["killed by signal 9"] * kills
        at_end = store_facts(house)
        # The images are as they were, and what parking took is free memory again, but for the
        # prefix cache.
        assert (at_end.size_bytes, at_end.images_digest) == (
            at_start.size_bytes,
            at_start.images_digest,
        )
        grown = at_end.resident_bytes - at_start.resident_bytes
        assert grown <= cached_bytes(house), "an idle pool keeps memory for parked KV"
        asyncio.run(kill_everything(house))
        poll(lambda: not workers_of(house.pool.process.pid), 10.0)
        assert list(house.pool.temp_dir.iterdir()) == []
        assert shared_memory() <= before
    count_traces(house)
    house.tally.seconds = time.monotonic() - begin_s
    assert house.tally.switches >= switches
    return house.tally


def test_a_short_campaign(tmp_path: Path) -> None:
    rng = random.Random(7)
    models = make_models(tmp_path)
    tally = house_of_fire(
        tmp_path / "house",
        models,
        draw_wishes(models, 36, rng),
        rng,
        parked_bytes=LITTLE,
        switches=12,
        kills=2,
    )
    assert tally.parks_in_answer > 0
    assert tally.resumes_after_kill > 0
    print(tally)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_campaign(
    tmp_path: Path,
    campaign_seed: int,
    campaign_full: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Default 200 switches and 10 kills; full 1,000 and 50. Three houses share them."""
    switches, kills = (1000, 50) if campaign_full else (200, 10)
    rng = random.Random(campaign_seed)
    models = make_models(tmp_path)
    wishes = draw_wishes(models, 240 if campaign_full else 90, rng)
    total = Tally()
    for name, parked_bytes, share in (
        ("little", LITTLE, 0.6),
        ("plenty", PLENTY, 0.3),
        ("no-room", NO_ROOM, 0.1),
    ):
        tally = house_of_fire(
            tmp_path / name,
            models,
            wishes,
            rng,
            parked_bytes=parked_bytes,
            switches=round(switches * share),
            kills=round(kills * share),
        )
        with capsys.disabled():
            print(f"\n{name}: {tally}", flush=True)
        assert (tally.parks_in_answer > 0) == (tally.resumes_after_kill > 0) == (parked_bytes > 0)
        total += tally
    with capsys.disabled():
        print(f"campaign, seed {campaign_seed}: {total}", flush=True)
    assert total.switches >= switches
    assert total.kills == kills
    assert total.recomputed > 0
    assert total.differing == 0

"""Adapters through the served pool: the right answers under switches, a worker's death, and reloads
that add, change and remove them or put other weights under them."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.plain import PlainModel
from support.pool_process import PoolProcess, poll, running_pool
from support.tiny import tiny_checkpoint
from support.tiny_adapter import lora_weights, tiny_adapter
from weft.models.hf_config import read_model_config

PROMPT = [3, 7, 11, 5, 40, 41, 42]
BASES = ("ant", "bee")
ADAPTERS = {
    "ant-x": ("ant", "x", {}),
    "ant-y": ("ant", "y", {"targets": ("q_proj", "v_proj"), "rank": 9, "strength": 1.5}),
    "bee-z": ("bee", "z", {"targets": ("up_proj", "down_proj"), "rank": 20, "use_rslora": True}),
}


def checkpoint(folder: Path, seed: int) -> Path:
    return tiny_checkpoint(
        folder, seed=seed, dtype="float64", hidden=128, intermediate=256, vocab=256
    )


def model(name: str, path: str | None = None, **adapters: str) -> dict[str, Any]:
    listed = [{"name": key.replace("_", "-"), "path": value} for key, value in adapters.items()]
    return {"name": name, "path": path or name, "adapters": listed}


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[PoolProcess]:
    """Room for one base with its adapters and some KV."""
    for seed, name in enumerate((*BASES, "cow")):
        arch = read_model_config(checkpoint(tmp_path / name, seed))
    for seed, (_, path, shape) in enumerate(ADAPTERS.values()):
        tiny_adapter(tmp_path / path, arch, seed=seed, **shape)
    models = [model("ant", ant_x="x", ant_y="y"), model("bee", bee_z="z")]
    engine = {"device_memory": "12M", "spare_host_memory": "16M"}
    with running_pool(tmp_path, models, engine=engine, turn_s=0.02) as running:
        running.wait_ready()
        yield running


def plain(folder: Path, base: str, adapter: str | None, tokens: int) -> list[int]:
    """What the base answers with this adapter's folder, alone."""
    one = PlainModel(folder / base, dtype="float64")
    if adapter is not None:
        one.adapter = lora_weights(folder / adapter, one.arch)
    return one.generate(PROMPT, tokens)[0]


def body(name: str, tokens: int) -> dict[str, Any]:
    asked = {"model": name, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    return {**asked, "ignore_eos": True, "return_token_ids": True}


def ask(pool: PoolProcess, name: str, tokens: int = 12) -> httpx.Response:
    return httpx.post(f"{pool.url}/v1/completions", json=body(name, tokens), timeout=60)


def ids(pool: PoolProcess, name: str, tokens: int = 12) -> list[int]:
    reply = ask(pool, name, tokens)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["token_ids"]


async def ask_all(
    pool: PoolProcess, names: list[str], tokens: int, kills: int = 0
) -> list[list[int]]:
    """All at once; the worker is killed on the way."""
    async with pool.client() as client:

        async def one(name: str) -> list[int]:
            reply = await client.post("/v1/completions", json=body(name, tokens))
            assert reply.status_code == 200, reply.text
            return reply.json()["choices"][0]["token_ids"]

        jobs = [asyncio.create_task(one(name)) for name in names]
        for killed in range(kills):
            loads = f"model={random.Random(killed).choice(BASES)} state=resident"
            before = pool.log().count(loads)
            await asyncio.to_thread(
                poll, lambda b=before, t=loads: pool.log().count(t) > b, 30, pool
            )
            pool.kill_worker()
        return list(await asyncio.gather(*jobs))


def reload(pool: PoolProcess) -> dict[str, Any]:
    with pool.admin() as admin:
        reply = admin.post("/admin/reload", json={})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_every_name_has_its_own_answer_under_switches_and_a_kill(
    pool: PoolProcess, tmp_path: Path
) -> None:
    tokens = 60
    want = {name: plain(tmp_path, name, None, tokens) for name in BASES}
    want |= {
        name: plain(tmp_path, base, path, tokens) for name, (base, path, _) in ADAPTERS.items()
    }
    assert len({tuple(answer) for answer in want.values()}) == 5, "an adapter does nothing"
    names = [*want, *want, *ADAPTERS]
    got = asyncio.run(ask_all(pool, names, tokens, kills=1))
    for name, answer in zip(names, got, strict=True):
        assert answer == want[name], name
    listed = httpx.get(f"{pool.url}/v1/models").json()["data"]
    parents = {entry["id"]: entry.get("parent") for entry in listed}
    assert parents == {name: ADAPTERS[name][0] if name in ADAPTERS else None for name in want}


def test_adapters_come_change_and_go_while_their_base_serves(
    pool: PoolProcess, tmp_path: Path
) -> None:
    arch = read_model_config(tmp_path / "ant")
    tiny_adapter(tmp_path / "w", arch, seed=9)
    before, long = ids(pool, "ant-x"), plain(tmp_path, "ant", "y", 300)
    assert ask(pool, "ant-w").status_code == 404

    async def scenario() -> list[int]:
        async with pool.client() as client:
            running = asyncio.create_task(
                client.post("/v1/completions", json=body("ant-y", 300), timeout=60)
            )
            await asyncio.to_thread(
                poll, lambda: "model=ant-y state=resident" in pool.log(), 30, pool
            )
            pool.configure(models=[model("ant", ant_x="z", ant_w="w"), model("bee", bee_z="z")])
            report = await asyncio.to_thread(reload, pool)
            assert report["added"] == ["ant-w"] and report["removed"] == ["ant-y"], report
            assert report["changed"] == ["ant-x"] and not report["failed"], report
            return (await running).json()["choices"][0]["token_ids"]

    assert asyncio.run(scenario()) == long, "what had begun goes on"
    assert ask(pool, "ant-y").status_code == 404
    assert ids(pool, "ant-w") == plain(tmp_path, "ant", "w", 12)
    poll(lambda: ids(pool, "ant-x") != before, 30, pool)
    assert ids(pool, "ant-x") == plain(tmp_path, "ant", "z", 12)
    assert ids(pool, "ant") == plain(tmp_path, "ant", None, 12)


def test_adapters_follow_their_base_to_other_weights(pool: PoolProcess, tmp_path: Path) -> None:
    assert ids(pool, "ant-x") == plain(tmp_path, "ant", "x", 12)
    pool.configure(models=[model("ant", "cow", ant_x="x", ant_y="y"), model("bee", bee_z="z")])
    assert "ant" in reload(pool)["changed"]
    new = plain(tmp_path, "cow", None, 12)
    poll(lambda: ids(pool, "ant") == new, 30, pool)
    assert ids(pool, "ant-x") == plain(tmp_path, "cow", "x", 12)
    assert ids(pool, "ant-y") == plain(tmp_path, "cow", "y", 12)
    assert ids(pool, "bee-z") == plain(tmp_path, "bee", "z", 12)


def test_a_broken_adapter_fails_alone_and_a_repaired_one_is_served(
    pool: PoolProcess, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    pool.configure(models=[model("ant", ant_x="x", ant_b="broken"), model("bee")])
    report = reload(pool)
    assert set(report["failed"]) == {"ant-b"} and set(report["removed"]) == {"ant-y", "bee-z"}
    reply = ask(pool, "ant-b")
    assert reply.status_code == 503 and "adapter_" in reply.text
    assert ids(pool, "ant-x") == plain(tmp_path, "ant", "x", 12)
    tiny_adapter(tmp_path / "broken", read_model_config(tmp_path / "ant"), seed=5)
    assert reload(pool)["added"] == ["ant-b"] or ids(pool, "ant-b")
    assert ids(pool, "ant-b") == plain(tmp_path, "ant", "broken", 12)

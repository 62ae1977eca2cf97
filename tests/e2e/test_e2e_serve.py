"""Real processes, tiny models in float64 on the CPU: three models where one or two fit."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.pool_process import PoolProcess, running_pool, stream_all, stream_text
from support.tiny import tiny_checkpoint

MODELS = ("ant", "bee", "cat")
SHAPES: dict[str, dict[str, Any]] = {
    "ant": {"family": "llama"},
    "bee": {"family": "qwen2", "kv_heads": 1},
    "cat": {"family": "llama", "tied": True, "kv_heads": 4},
}


def make_models(folder: Path) -> list[dict[str, Any]]:
    for seed, name in enumerate(MODELS):
        # 2 layers of hidden 128 in float64: 2 to 3 MiB of weights each.
        shape = {"hidden": 128, "intermediate": 256, "vocab": 256, **SHAPES[name]}
        tiny_checkpoint(folder / name, seed=seed, dtype="float64", **shape)
    return [{"name": name, "path": name} for name in MODELS]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("serve")
    models = make_models(folder)
    broken = tiny_checkpoint(folder / "broken", seed=9)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    models.append({"name": "broken", "path": "broken"})
    models.append({"name": "nowhere", "path": "nowhere"})
    with running_pool(folder, models, engine={"device_memory": "6M"}, turn_s=0.05) as running:
        running.wait_ready()
        yield running


def jobs(count: int) -> list[tuple[str, list[int]]]:
    return [(MODELS[i % 3], [3 + i, 7, 11 + i, 5]) for i in range(count)]


def switches(metrics: str) -> float:
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if "switches" in line and not line.startswith("#")
    )


def test_models_that_do_not_fit_together_stream_together(pool: PoolProcess) -> None:
    async def scenario() -> None:
        async with pool.client() as client:
            alone = [
                await stream_text(client, m, p, max_tokens=24, temperature=0, ignore_eos=True)
                for m, p in jobs(6)
            ]
        together = await stream_all(pool, jobs(6), max_tokens=24, temperature=0, ignore_eos=True)
        assert together == alone
        assert len(set(alone)) == len(alone), "the answers do not depend on model and prompt"

    asyncio.run(scenario())
    assert switches(httpx.get(f"{pool.url}/metrics").text) > 0


def test_a_broken_checkpoint_fails_alone(pool: PoolProcess) -> None:
    for name in ("broken", "nowhere"):
        reply = httpx.post(
            f"{pool.url}/v1/completions", json={"model": name, "prompt": [1], "max_tokens": 1}
        )
        assert reply.status_code == 503, reply.text
        assert reply.json()["error"]["code"] == "model_failed"
    assert httpx.get(f"{pool.url}/ready").status_code == 200
    for name in ("broken", "nowhere"):
        assert f"model={name} state=failed" in pool.log()


MALFORMED: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b'{"model": "ant"}',
    b'{"model": "ant", "prompt": [1], "max_tokens": -3}',
    b'{"model": "ant", "prompt": [99999], "max_tokens": 1}',
    b'{"model": "ant", "prompt": [-1], "max_tokens": 1}',
    b'{"model": "ant", "prompt": [1], "temperature": "hot"}',
    b'{"model": "ant", "prompt": [1], "max_tokens": 100000}',
    b'{"model": "dog", "prompt": [1]}',
    b'{"model": "ant", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
]


def test_malformed_requests_while_others_stream(pool: PoolProcess) -> None:
    async def scenario() -> None:
        plain = await stream_all(pool, jobs(3), max_tokens=40, temperature=0, ignore_eos=True)
        streaming = asyncio.create_task(
            stream_all(pool, jobs(3), max_tokens=40, temperature=0, ignore_eos=True)
        )
        async with pool.client() as client:
            for body in MALFORMED * 2:
                reply = await client.post(
                    "/v1/completions", content=body, headers={"content-type": "application/json"}
                )
                assert 400 <= reply.status_code < 500, (body[:80], reply.text)
                assert reply.json()["error"]["message"]
        assert await streaming == plain

    asyncio.run(scenario())


def test_a_client_that_leaves_frees_its_place(pool: PoolProcess) -> None:
    async def scenario() -> None:
        async with pool.client() as client:
            body = {"model": "ant", "prompt": [5, 6], "max_tokens": 400, "stream": True}
            body["ignore_eos"] = True
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    break
            while (await client.get("/health")).json()["waiting"] != 0:
                await asyncio.sleep(0.02)

    asyncio.run(scenario())

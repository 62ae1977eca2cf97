"""A whole pool on the GPU: switches, a killed worker, and a device that is free afterwards."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.gpu import needs_gpu
from support.pool_process import PoolProcess, alive, poll, running_pool, sse
from support.tiny import tiny_checkpoint

pytestmark = [*needs_gpu, pytest.mark.timeout(400)]

MODELS = ("ant", "bee", "cat")
TOKENS = 200


def make_models(folder: Path) -> list[dict[str, Any]]:
    for seed, name in enumerate(MODELS):
        family = "qwen2" if name == "bee" else "llama"
        tiny_checkpoint(folder / name, seed=seed, dtype="bfloat16", family=family)
    return [{"name": name, "path": name} for name in MODELS]


def device_users() -> set[int]:
    """Processes that hold memory of the device, as the driver sees them."""
    command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {int(line) for line in out.split() if line.isdigit()}


def used_mib() -> int:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(out.split()[0])


async def streamed_tokens(client: httpx.AsyncClient, model: str, prompt: list[int]) -> int:
    """Output tokens of one stream that ran to its end."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    usage = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for event in sse(response):
            assert "error" not in event, event
            if event.get("usage"):
                usage = event["usage"]["completion_tokens"]
    return usage


async def streams(pool: PoolProcess, kills: int) -> list[int]:
    async with pool.client(200.0) as client:
        tasks = [
            asyncio.create_task(streamed_tokens(client, MODELS[i % 3], [7 + i, 9, 11]))
            for i in range(12)
        ]
        for _ in range(kills):
            await asyncio.sleep(0.5)
            while not pool.kill_worker():
                await asyncio.sleep(0.05)
            while not pool.worker_pids():
                await asyncio.sleep(0.05)
        return list(await asyncio.gather(*tasks))


def unit(pool: PoolProcess) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{pool.url}/weft/status").json()["pool"]["units"][0]
    return found


def test_serve_switch_kill_and_free(tmp_path: Path) -> None:
    before = used_mib()
    engine = {"device": "cuda", "device_memory": "256M", "host_memory": "1G"}
    with running_pool(tmp_path, make_models(tmp_path), engine=engine, turn_s=0.05) as pool:
        pool.wait_ready(120.0)
        assert asyncio.run(streams(pool, kills=0)) == [TOKENS] * 12
        # Counts begin anew with every worker, so they are looked at before the first one dies.
        assert sum(model["switches_in"] for model in unit(pool)["status"]["models"]) > 3
        assert asyncio.run(streams(pool, kills=2)) == [TOKENS] * 12
        assert unit(pool)["restarts"] == 2
        poll(lambda: len(pool.worker_pids()) == 1, 60.0, pool)
        (worker,) = pool.worker_pids()
        os.kill(pool.process.pid, signal.SIGKILL)
        pool.process.wait()
        poll(lambda: not alive(worker), 30.0, pool)
        poll(lambda: worker not in device_users() and used_mib() <= before + 64, 30.0, pool)

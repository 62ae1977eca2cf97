"""The prefix cache seen from outside: usage says what was found, and no answer changes by it."""

import hashlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.pool_process import PoolProcess, poll, running_pool
from support.tiny import tiny_checkpoint

KEYS = {"one": "key-of-one", "two": "key-of-two"}
PROMPT = [(7 * i + i // 5) % 250 + 5 for i in range(300)]
"""Two whole pages of 128 tokens and some more."""
FOUND = 256


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    """Two models that do not fit together, two clients who do not know of each other."""
    folder = tmp_path_factory.mktemp("prefix")
    for seed, (name, family) in enumerate({"ant": "llama", "bee": "qwen2"}.items()):
        tiny_checkpoint(
            folder / name,
            seed=seed,
            dtype="float64",
            family=family,
            hidden=128,
            intermediate=256,
            vocab=256,
        )
    keys = [
        {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "operator": True}
        for name, key in KEYS.items()
    ]
    with running_pool(
        folder,
        [{"name": "ant", "path": "ant"}, {"name": "bee", "path": "bee"}],
        engine={"device_memory": "5M"},
        server={"keys": keys},
        turn_s=0.05,
    ) as running:
        running.wait_ready()
        yield running


def call(pool: PoolProcess, who: str, method: str, path: str, **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEYS[who]}"}
    reply = httpx.request(
        method, f"{pool.url}{path}", json=body or None, headers=headers, timeout=60.0
    )
    assert reply.status_code == 200, reply.text
    return reply


def complete(
    pool: PoolProcess, who: str, model: str = "ant", prompt: list[int] = PROMPT, **body: Any
) -> tuple[str, int]:
    """Text and cached tokens."""
    wanted = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, **body}
    reply = call(pool, who, "POST", "/v1/completions", model=model, prompt=prompt, **wanted).json()
    assert reply["usage"]["prompt_tokens"] == len(prompt)
    return reply["choices"][0]["text"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def status_of(pool: PoolProcess, model: str) -> dict[str, Any]:
    (unit,) = call(pool, "one", "GET", "/weft/status").json()["pool"]["units"]
    models = unit["status"]["models"] if unit["status"] is not None else []
    return next((m for m in models if m["name"] == model), {"state": None, "host_pages_cached": 0})


def test_who_asks_again_gets_the_same_and_pays_less(pool: PoolProcess) -> None:
    first, cached = complete(pool, "one")
    assert cached == 0
    for _ in range(2):
        assert complete(pool, "one") == (first, FOUND)
    # Another end of the prompt: what is found ends with the last whole page that is the same.
    other, cached = complete(pool, "one", prompt=[*PROMPT[:200], 9, 9, 9])
    assert cached == 128 and other != first
    seeded = {"temperature": 1, "seed": 11}
    drawn, _ = complete(pool, "one", **seeded)
    assert complete(pool, "two", **seeded) == (drawn, 0)


def test_a_prefix_outlives_a_switch(pool: PoolProcess) -> None:
    before, _ = complete(pool, "one")
    poll(lambda: status_of(pool, "ant")["host_pages_cached"] >= 2, 20.0, pool)
    complete(pool, "one", model="bee")
    poll(lambda: status_of(pool, "ant")["state"] == "absent", 20.0, pool)
    assert complete(pool, "one") == (before, FOUND)
    metrics = call(pool, "one", "GET", "/metrics").text
    hits = [x for x in metrics.splitlines() if x.startswith("weft_prefix_hit_tokens_total{")]
    assert any('model="ant"' in x and float(x.rsplit(" ", 1)[1]) >= FOUND for x in hits), hits


def test_nobody_finds_what_another_key_or_salt_left(pool: PoolProcess) -> None:
    prompt = [(11 * i) % 250 + 5 for i in range(300)]
    text, cached = complete(pool, "one", prompt=prompt)
    assert cached == 0
    assert complete(pool, "two", prompt=prompt) == (text, 0)
    assert complete(pool, "one", prompt=prompt, cache_salt="pepper") == (text, 0)
    assert complete(pool, "one", prompt=prompt, cache_salt="pepper") == (text, FOUND)
    assert complete(pool, "one", prompt=prompt) == (text, FOUND)
    assert complete(pool, "two", prompt=prompt) == (text, FOUND)


def test_a_new_worker_starts_with_an_empty_cache(pool: PoolProcess) -> None:
    before, _ = complete(pool, "one")
    victims = pool.worker_pids()
    assert pool.kill_worker()
    poll(lambda: pool.worker_pids() not in ([], victims), 20.0, pool)
    assert complete(pool, "one") == (before, 0)
    assert complete(pool, "one") == (before, FOUND)

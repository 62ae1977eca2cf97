"""A real pool behind keys."""

from pathlib import Path
from typing import Any

import httpx

from support.pool_process import PoolProcess, poll, running_pool
from support.tiny import tiny_checkpoint
from weft.server.keys import hash_of, new_key

ALICE, BOB, OPS = new_key(), new_key(), new_key()
KEYS: list[dict[str, Any]] = [
    {"name": "alice", "sha256": hash_of(ALICE), "cold_models_per_minute": 0},
    {"name": "bob", "sha256": hash_of(BOB), "tokens_per_minute": 20},
    {"name": "ops", "sha256": hash_of(OPS), "models": ["-"], "operator": True},
]


def ask(pool: PoolProcess, key: str, **body: Any) -> httpx.Response:
    payload = {"model": "ant", "prompt": [5, 6, 7, 8], "max_tokens": 4, "ignore_eos": True, **body}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{pool.url}/v1/completions", json=payload, headers=headers, timeout=60)


def test_keys_and_their_limits(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "ant", seed=1, dtype="float64")
    models = [{"name": "ant", "path": "ant"}]
    with running_pool(tmp_path, models, server={"keys": KEYS, "access_log": True}) as pool:
        pool.wait_ready()
        assert ask(pool, "").status_code == 401
        assert ask(pool, OPS).status_code == 404
        cold = ask(pool, ALICE)
        assert cold.status_code == 429 and cold.headers["retry-after"] == "60"
        # Bob may bring it in: 8 tokens of 20, 16, and 24 once the third is admitted.
        assert [ask(pool, BOB).status_code for _ in range(4)] == [200, 200, 200, 429]
        status = {"headers": {"Authorization": f"Bearer {OPS}"}}

        def resident() -> bool:
            found = httpx.get(f"{pool.url}/weft/status", **status).json()  # type: ignore[arg-type]
            return found["pool"]["units"][0]["status"]["models"][0]["state"] == "resident"

        poll(resident, 30, pool)
        assert ask(pool, ALICE).status_code == 200
        assert pool.stop() == 0
        log = pool.log()
        assert "key=bob" in log and "status=429" in log
        assert not any(key in log for key in (ALICE, BOB, OPS))

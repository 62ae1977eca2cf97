"""The served OpenAPI document against a pool of two tiny models: 2,000 drawn requests an operation.
tests/cpu/server/test_server_schemathesis.py does a little of it with models that are scripted."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis

from support.openapi_fuzz import NAMES, OPERATIONS, fuzz_all, narrow
from support.pool_process import PoolProcess, running_pool
from support.tiny import tiny_checkpoint

EXAMPLES = 2000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    folder = tmp_path_factory.mktemp("openapi")
    for seed, name in enumerate(NAMES):
        tiny_checkpoint(folder / name, seed=seed, dtype="float32", max_position=256)
    models = [{"name": name, "path": name, "defaults": {"max_tokens": 4}} for name in NAMES]
    with running_pool(folder, models) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def document(pool: PoolProcess) -> Any:
    return schemathesis.openapi.from_url(f"{pool.url}/openapi.json")


@pytest.fixture(scope="module")
def narrowed(pool: PoolProcess) -> Any:
    return narrow(pool.url)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_pool_answers_as_documented(
    pool: PoolProcess, document: Any, narrowed: Any, operation: str
) -> None:
    restarts = pool.worker_pids()
    fuzz_all(document, narrowed, operation, EXAMPLES)
    assert pool.worker_pids() == restarts, "no request kills a worker"
    with httpx.Client(base_url=pool.url, timeout=30) as client:
        assert client.get("/health").status_code == 200
        status = client.get("/weft/status").json()
        assert status["pool"]["unfinished"] == 0

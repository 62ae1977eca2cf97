"""/metrics, /health, /ready and /weft/status; and docs/metrics.md says what is served."""

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.fake_hub import FakeHub, Hold, card, spoken
from support.live import asgi_client, live
from support.tiny import write_tokenizer
from weft.core.errors import ReplyError
from weft.hub.base import Chunk, Health
from weft.server.status import StatusReply

DOC = Path(__file__).parents[3] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    write_tokenizer(path, 300)
    return path


def get(hub: FakeHub, path: str) -> httpx.Response:
    async def scenario() -> httpx.Response:
        async with asgi_client(hub) as client:
            return await client.get(path)

    return asyncio.run(scenario())


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float | None:
    return samples(text).get((name, frozenset(labels.items())))


def test_the_documented_names_labels_and_types_are_the_served_ones(folder: Path) -> None:
    async def scenario() -> str:
        hub = FakeHub([card("m", folder)], lambda _: spoken([9, 10]))
        async with asgi_client(hub) as client:
            await client.post("/v1/completions", json={"model": "m", "prompt": "a"})
            return (await client.get("/metrics")).text

    served = {}
    for family in text_string_to_metric_families(asyncio.run(scenario())):
        suffix = "_total" if family.type == "counter" else ""
        labels = {name for sample in family.samples for name in sample.labels}
        served[family.name + suffix] = (family.type, labels - {"le"})
    rows = re.findall(r"^\| `(weft_\w+)` \| (\w+)[ ↺]* \| ([\w, ]*)\|", DOC.read_text(), re.M)
    documented = {
        name: (kind, {label.strip() for label in labels.split(",") if label.strip()})
        for name, kind, labels in rows
    }
    assert documented == served


def test_requests_are_counted_by_outcome(folder: Path) -> None:
    scripts: dict[int, Any] = {
        1: spoken([9, 10], finish="stop"),
        2: spoken([9], finish="length"),
    }
    hub = FakeHub([card("m", folder)], lambda new: scripts[len(new.prompt)])

    async def scenario() -> str:
        async with asgi_client(hub) as client:
            for body in (
                {"model": "m", "prompt": [[5], [5, 5]]},
                {"model": "m", "prompt": [5], "stream": True},
                {"model": "m", "prompt": [5], "n": 300},
                {"model": "made up", "prompt": [5]},
            ):
                await client.post("/v1/completions", json=body)
            return (await client.get("/metrics")).text

    text = asyncio.run(scenario())
    assert value(text, "weft_requests_total", model="m", outcome="stop") == 2
    assert value(text, "weft_requests_total", model="m", outcome="length") == 1
    assert value(text, "weft_requests_total", model="m", outcome="refused") == 1
    assert value(text, "weft_requests_total", model="(unknown)", outcome="refused") == 1
    assert "made up" not in text
    assert value(text, "weft_ttft_seconds_count", model="m") == 3
    assert value(text, "weft_tbt_seconds_count", model="m") == 2
    assert value(text, "weft_prompt_tokens_total", model="m") == 4
    assert value(text, "weft_output_tokens_total", model="m") == 5


def test_objectives_are_counted_token_by_token(folder: Path) -> None:
    """Deadlines far away, and deadlines that were over before the request came."""
    failed = ReplyError(code="request_failed", message="x")
    scripts: dict[str, Any] = {
        "easy": spoken([9, 10], per_chunk=2),
        "hard": spoken([9, 10], per_chunk=2),
        "broken": [Chunk(tokens=(9,)), Chunk(finish="error", error=failed)],
    }
    cards = [
        msgspec.structs.replace(card(name, folder), ttft_slo_s=ttft_s, tbt_slo_s=0.0)
        for name, ttft_s in (("easy", 1000.0), ("hard", -1.0), ("broken", 1000.0))
    ]
    hub = FakeHub(cards, lambda new: scripts[new.model])

    async def scenario() -> str:
        async with asgi_client(hub) as client:
            for name in scripts:
                await client.post("/v1/completions", json={"model": name, "prompt": [5]})
            return (await client.get("/metrics")).text

    text = asyncio.run(scenario())
    for name, share, tokens in (("easy", 1.0, 2), ("hard", 0.0, 2), ("broken", 0.0, 1)):
        assert value(text, "weft_slo_attainment_sum", model=name) == share
        assert value(text, "weft_slo_attainment_count", model=name) == 1
        assert value(text, "weft_slo_tokens_total", model=name) == tokens
        assert value(text, "weft_slo_tokens_in_time_total", model=name) == tokens * share


def test_a_client_that_left_is_counted_as_cancelled(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def scenario() -> str:
        hold = Hold()
        hub = FakeHub([card("m", folder)], lambda _: [Chunk(tokens=(9,)), hold])
        async with (
            live(hub) as server,
            httpx.AsyncClient(base_url=server.url) as client,
        ):
            async with httpx.AsyncClient(base_url=server.url) as leaver:
                body = {"model": "m", "prompt": "a", "stream": True}
                async with leaver.stream("POST", "/v1/completions", json=body):
                    await hold.reached.wait()
            await asyncio.wait_for(hub.cancel_seen.wait(), 10)
            return (await client.get("/metrics")).text

    text = asyncio.run(scenario())
    assert value(text, "weft_requests_total", model="m", outcome="cancelled") == 1
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if line.endswith("model=m state=cancelled")]) == 1


def test_the_pool_is_shown(folder: Path) -> None:
    hub = FakeHub([card("m", folder), card("n", folder, failed="torn")], lambda _: [])
    text = get(hub, "/metrics").text
    assert value(text, "weft_granules_free", unit="0") == 7
    assert value(text, "weft_switches_in_total", unit="0", model="m") == 6
    assert value(text, "weft_loads_total", unit="0", model="m", cause="asked") == 2
    assert value(text, "weft_drops_total", unit="0", model="m", cause="room") == 5
    assert value(text, "weft_load_seconds_total", unit="0", model="m") == 3.0
    assert value(text, "weft_queue_wait_seconds_total", unit="0", model="m") == 0.5
    assert value(text, "weft_requests_parked", unit="0", model="n") == 4
    assert value(text, "weft_model_state", unit="0", model="n", state="absent") == 1
    assert value(text, "weft_model_failed", model="n") == 1
    assert value(text, "weft_unit_restarts_total", unit="0") == 1


def test_health_and_readiness_are_the_hubs(folder: Path) -> None:
    hub = FakeHub([card("m", folder)], lambda _: [])
    assert (get(hub, "/health").status_code, get(hub, "/ready").status_code) == (200, 200)
    hub.state = Health(healthy=False, ready=False, waiting=3, since_progress_s=77.0)
    sick = get(hub, "/health")
    assert sick.status_code == 503
    assert sick.json()["since_progress_s"] == 77.0
    assert get(hub, "/ready").status_code == 503


def test_status_is_the_hubs_view(folder: Path) -> None:
    hub = FakeHub([card("m", folder)], lambda _: [])
    reply = msgspec.json.decode(get(hub, "/weft/status").content, type=StatusReply)
    assert reply.pool == hub.view()
    assert reply.health == hub.health()

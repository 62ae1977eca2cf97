"""Requests drawn from the served OpenAPI document: no 5xx, no hang, nothing undocumented."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from support.fake_hub import FakeHub, card, obliging, tokens_of
from support.live import live
from support.tiny import write_tokenizer

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
NAMES = ("m", "n")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A frontend in a thread of its own, whose models say a few words."""
    folder: Path = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, 300)
    said = tokens_of(folder, 'well <tool_call>{"name": "f", "arguments": {}}</tool_call>')
    hub = FakeHub([card(name, folder) for name in NAMES], obliging(said))
    loop = asyncio.new_event_loop()
    ready: asyncio.Future[str] = loop.create_future()
    end = asyncio.Event()

    async def serve() -> None:
        async with live(hub) as server:
            ready.set_result(server.url)
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()

    async def started() -> str:
        return await ready

    yield asyncio.run_coroutine_threadsafe(started(), loop).result(30)
    loop.call_soon_threadsafe(end.set)
    thread.join(30)
    loop.close()


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    # Else nearly every request ends at a model that nobody serves.
    for body in schema.raw_schema["components"]["schemas"].values():
        model = body.get("properties", {}).get("model")
        if model is not None and "maxLength" in model:
            model |= {"enum": list(NAMES)}
    return schema


schema = schemathesis.pytest.from_fixture("document")


def fuzz(max_examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=max_examples, deadline=None, suppress_health_check=QUIET)


@schema.parametrize()
@fuzz(20)
def test_a_drawn_request_is_answered_as_documented(case: Any) -> None:
    case.call_and_validate(checks=CHECKS, timeout=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@schema.parametrize()
@fuzz(2000)
def test_two_thousand_drawn_requests_are_answered_as_documented(case: Any) -> None:
    case.call_and_validate(checks=CHECKS, timeout=20)

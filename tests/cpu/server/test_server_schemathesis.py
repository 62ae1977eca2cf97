"""Requests drawn from the served OpenAPI document: no 5xx, no hang, nothing undocumented."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis

from support.fake_hub import FakeHub, card, obliging, tokens_of
from support.live import live
from support.openapi_fuzz import NAMES, OPERATIONS, fuzz_all, narrow
from support.tiny import write_tokenizer


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
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.fixture(scope="module")
def narrowed(url: str) -> Any:
    return narrow(url)


def test_every_operation_is_drawn(document: Any) -> None:
    served = {result.ok().label for result in document.get_all_operations()}
    assert served == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_drawn_requests_are_answered_as_documented(
    document: Any, narrowed: Any, operation: str
) -> None:
    fuzz_all(document, narrowed, operation, 20)

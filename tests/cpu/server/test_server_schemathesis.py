"""Requests drawn from the served OpenAPI document: no 5xx, no hang, nothing undocumented."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
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
NAMES = ("m", "n")
_IDS = {"type": "array", "items": {"enum": [0, 5, 77]}, "minItems": 1, "maxItems": 20}
_WORDS = {"type": "string", "minLength": 1, "maxLength": 40}
_PROMPTS = {
    "anyOf": [_WORDS, _IDS, {"type": "array", "items": _WORDS, "minItems": 1, "maxItems": 5}]
}
SHORT = {"prompt": _PROMPTS, "input": _WORDS, "tokens": _IDS}


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
    """The same with fewer ways to be refused, so that most requests reach the hub."""
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schemas = document.raw_schema["components"]["schemas"]
    for name, body in schemas.items():
        fields = body.get("properties", {})
        if "maxLength" in fields.get("model", {}):
            fields["model"] |= {"enum": list(NAMES)}
        for field in ("logit_bias", "chat_template_kwargs", "tools", "tool_choice", "dimensions"):
            if name.endswith("Request"):
                fields.pop(field, None)
        for field in ("prompt", "input", "tokens"):
            if name.endswith("Request") and field in fields:
                fields[field] = SHORT[field]
        for field in ("guided_json", "guided_regex", "guided_grammar", "structured_outputs"):
            fields.pop(field, None)
    message = schemas["Message"]["properties"]
    message["content"] = {"type": "string", "minLength": 1, "maxLength": 50}
    message.pop("tool_calls")
    message.pop("reasoning_content")
    schemas["Message"]["required"] = ["role", "content"]
    return document


OPERATIONS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
    "POST /v1/responses",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /health",
    "GET /ready",
    "GET /metrics",
    "GET /weft/status",
)


def fuzz(document: Any, operation: str, mode: GenerationMode, max_examples: int) -> list[int]:
    """The statuses of the answers."""
    method, path = operation.split(" ")
    statuses: list[int] = []

    @seed(1)
    @settings(
        max_examples=max_examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        database=None,
    )
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def drawn(case: Any) -> None:
        statuses.append(case.call_and_validate(checks=CHECKS, timeout=20).status_code)

    drawn()
    return statuses


def fuzz_all(document: Any, narrowed: Any, operation: str, max_examples: int) -> None:
    """Requests that fit the document, requests that break it, and requests that are served."""
    part = max_examples // 3 + 1
    fuzz(document, operation, GenerationMode.POSITIVE, part)
    if operation.startswith("POST"):
        broken = fuzz(document, operation, GenerationMode.NEGATIVE, part)
        assert 200 not in broken
    statuses = fuzz(narrowed, operation, GenerationMode.POSITIVE, part)
    if operation != "GET /v1/models/{name}":
        assert 200 in statuses


def test_every_operation_is_drawn(document: Any) -> None:
    served = {result.ok().label for result in document.get_all_operations()}
    assert served == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_drawn_requests_are_answered_as_documented(
    document: Any, narrowed: Any, operation: str
) -> None:
    fuzz_all(document, narrowed, operation, 20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_two_thousand_drawn_requests_are_too(document: Any, narrowed: Any, operation: str) -> None:
    fuzz_all(document, narrowed, operation, 2000)

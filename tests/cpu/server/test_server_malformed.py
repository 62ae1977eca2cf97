"""Bad requests are refused with an OpenAI-shaped 4xx, and the hub never hears of them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.fake_hub import FakeHub, card, spoken
from support.live import asgi_client, live
from support.tiny import write_tokenizer
from weft.server.body import UNSUPPORTED
from weft.server.schemas import ChatRequest

USER = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "m", "messages": USER}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}
MAX_BODY = 1 << 16


def said(content: Any, role: str = "user") -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": role, "content": content}]}


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def called(arguments: str) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


CHATS: list[tuple[str, Any, int, str | None]] = [
    ("not an object", [1], 400, None),
    ("no model", {"messages": USER}, 400, "model"),
    ("model a number", {**CHAT, "model": 3}, 400, "model"),
    ("model empty", {**CHAT, "model": ""}, 400, "model"),
    ("model too long", {**CHAT, "model": "m" * 300}, 400, "model"),
    ("model unknown", {**CHAT, "model": "nope"}, 404, None),
    ("model broken", {**CHAT, "model": "broken"}, 503, None),
    ("no messages", {"model": "m"}, 400, "messages"),
    ("messages empty", {**CHAT, "messages": []}, 400, "messages"),
    ("messages an object", {**CHAT, "messages": {}}, 400, "messages"),
    ("message a text", {**CHAT, "messages": ["hi"]}, 400, "messages[0]"),
    ("role unknown", said("a", role="bot"), 400, "messages[0].role"),
    ("no role", {**CHAT, "messages": [{"content": "a"}]}, 400, "messages[0].role"),
    ("content null", said(None), 400, "messages[0]"),
    ("no content", {**CHAT, "messages": [{"role": "system"}]}, 400, "messages[0]"),
    ("content a number", said(1), 400, None),
    (
        "an image",
        {
            **CHAT,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://x"}}],
                }
            ],
        },
        400,
        "messages[0].content[0].type",
    ),
    (
        "message field unknown",
        {**CHAT, "messages": [{"role": "user", "content": "a", "color": 1}]},
        400,
        "messages[0].color",
    ),
    (
        "tool calls in a message",
        {
            **CHAT,
            "messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        },
        400,
        "messages[0].tool_calls[0].function",
    ),
    ("field unknown", {**CHAT, "temprature": 1}, 400, "temprature"),
    ("temperature too high", {**CHAT, "temperature": 2.5}, 400, "temperature"),
    ("temperature negative", {**CHAT, "temperature": -1}, 400, "temperature"),
    ("temperature a text", {**CHAT, "temperature": "1"}, 400, "temperature"),
    ("temperature a bool", {**CHAT, "temperature": True}, 400, "temperature"),
    ("top_p zero", {**CHAT, "top_p": 0}, 400, "top_p"),
    ("top_p above one", {**CHAT, "top_p": 1.01}, 400, "top_p"),
    ("top_k below -1", {**CHAT, "top_k": -2}, 400, "top_k"),
    ("seed too big", {**CHAT, "seed": 1 << 63}, 400, "seed"),
    ("seed a fraction", {**CHAT, "seed": 1.5}, 400, "seed"),
    ("max_tokens zero", {**CHAT, "max_tokens": 0}, 400, "max_tokens"),
    ("max_tokens huge", {**CHAT, "max_tokens": 10**30}, 400, "max_tokens"),
    ("max_tokens over context", {**CHAT, "max_tokens": 512}, 400, None),
    ("max_completion_tokens negative", {**CHAT, "max_completion_tokens": -1}, 400, None),
    ("min over max", {**CHAT, "max_tokens": 2, "min_tokens": 3}, 400, "min_tokens"),
    ("stop empty", {**CHAT, "stop": ""}, 400, "stop"),
    ("stop too many", {**CHAT, "stop": ["a"] * 17}, 400, "stop"),
    ("stop too long", {**CHAT, "stop": "a" * 257}, 400, "stop"),
    ("stop a number", {**CHAT, "stop": [1]}, 400, None),
    ("stop token outside", {**CHAT, "stop_token_ids": [300]}, 400, "stop_token_ids"),
    ("stream a text", {**CHAT, "stream": "yes"}, 400, "stream"),
    ("stream options without stream", {**CHAT, "stream_options": {}}, 400, "stream_options"),
    (
        "stream option unknown",
        {**CHAT, "stream": True, "stream_options": {"x": 1}},
        400,
        "stream_options.x",
    ),
    ("a template", {**CHAT, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
    ("no answers", {**CHAT, "n": 0}, 400, "n"),
    ("too many answers", {**CHAT, "n": 129}, 400, "n"),
    ("n a bool", {**CHAT, "n": True}, 400, "n"),
    ("logprobs a number", {**CHAT, "logprobs": 1}, 400, "logprobs"),
    ("top_logprobs alone", {**CHAT, "top_logprobs": 1}, 400, None),
    ("too many top_logprobs", {**CHAT, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ("too many prompt_logprobs", {**CHAT, "prompt_logprobs": 21}, 400, "prompt_logprobs"),
    ("a tool without a function", {**CHAT, "tools": [{"type": "function"}]}, 400, None),
    ("a tool of another type", {**CHAT, "tools": [{"type": "web"}]}, 400, "tools[0].type"),
    ("a tool with a bad name", {**CHAT, "tools": [tool("a b")]}, 400, "tools[0].function.name"),
    ("two tools of one name", {**CHAT, "tools": [tool("f"), tool("f")]}, 400, None),
    ("too many tools", {**CHAT, "tools": [tool(f"f{i}") for i in range(129)]}, 400, "tools"),
    ("a call without tools", {**CHAT, "tool_choice": "required"}, 400, "tool_choice"),
    ("a choice unknown", {**CHAT, "tool_choice": "some"}, 400, "tool_choice"),
    (
        "a choice that is no tool",
        {
            **CHAT,
            "tools": [tool("f")],
            "tool_choice": {"type": "function", "function": {"name": "g"}},
        },
        400,
        "tool_choice",
    ),
    (
        "arguments that no grammar follows",
        {**CHAT, "tools": [tool("f", type="objec")], "tool_choice": "required"},
        400,
        "tools",
    ),
    (
        "a schema that no grammar follows",
        {**CHAT, "guided_json": {"type": "objec"}},
        400,
        "guided_json",
    ),
    ("a regex that is none", {**CHAT, "guided_regex": "("}, 400, "guided_regex"),
    (
        "a regex and tools",
        {**CHAT, "guided_regex": "a", "tools": [tool("f")]},
        400,
        "guided_regex",
    ),
    (
        "arguments in the history that are no object",
        {**CHAT, "messages": [called("[1]")]},
        400,
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        "arguments in the history that are no JSON",
        {**CHAT, "messages": [called("{")]},
        400,
        "messages[0].tool_calls[0].function.arguments",
    ),
    *(
        (
            f"arguments in the history with {what}",
            {**CHAT, "messages": [called(arguments)]},
            400,
            "messages[0].tool_calls[0].function.arguments",
        )
        for what, arguments in {
            "half a character": '{"a": "\\ud800"}',
            "no number": '{"a": NaN}',
            "depth without end": '{"a":' + "[" * 900 + "]" * 900 + "}",
        }.items()
    ),
    (
        "arguments in the history that are longer than the context",
        {**CHAT, "messages": [called('{"a":[' + "{}," * 3000 + "{}]}")]},
        400,
        "messages",
    ),
    (
        "a schema with half a character",
        {**CHAT, "guided_json": '{"const": "\\ud800"}'},
        400,
        "guided_json",
    ),
    ("a schema with no number", {**CHAT, "guided_json": '{"maximum": 1e999}'}, 400, "guided_json"),
    ("a template's own word", {**CHAT, "chat_template_kwargs": {"messages": "x"}}, 400, None),
    ("a template's list", {**CHAT, "chat_template_kwargs": {"x": [1]}}, 400, None),
    ("a format unknown", {**CHAT, "response_format": {"type": "xml"}}, 400, "response_format"),
    (
        "a format without its schema",
        {**CHAT, "response_format": {"type": "json_schema"}},
        400,
        "response_format.json_schema",
    ),
    ("two formats", {**CHAT, "guided_regex": "a", "guided_choice": ["b"]}, 400, "guided_choice"),
    ("no structure", {**CHAT, "structured_outputs": {}}, 400, "structured_outputs"),
    ("choices empty", {**CHAT, "structured_outputs": {"choice": []}}, 400, None),
    ("too many guided choices", {**CHAT, "guided_choice": ["a"] * 1025}, 400, "guided_choice"),
    ("presence_penalty too low", {**CHAT, "presence_penalty": -2.1}, 400, "presence_penalty"),
    ("frequency_penalty too high", {**CHAT, "frequency_penalty": 3}, 400, "frequency_penalty"),
    ("repetition_penalty zero", {**CHAT, "repetition_penalty": 0}, 400, "repetition_penalty"),
    ("min_p above one", {**CHAT, "min_p": 1.5}, 400, "min_p"),
    ("bias of a word", {**CHAT, "logit_bias": {"yes": 1}}, 400, None),
    ("bias too strong", {**CHAT, "logit_bias": {"5": 101}}, 400, None),
    ("bias outside", {**CHAT, "logit_bias": {"300": 1}}, 400, "logit_bias"),
    ("bias twice", {**CHAT, "logit_bias": {"5": 1, "05": 2}}, 400, "logit_bias"),
    ("biases too many", {**CHAT, "logit_bias": {str(i): 1 for i in range(1025)}}, 400, None),
    ("priority out of bounds", {**CHAT, "priority": 1001}, 400, "priority"),
    ("salt empty", {**CHAT, "cache_salt": ""}, 400, "cache_salt"),
    ("too long a chat", said("a" * 5000), 400, "messages"),
    ("a chat over context", said("@" * 600), 400, None),
]
TEXTS: list[tuple[str, Any, int, str | None]] = [
    ("no prompt", {"model": "m"}, 400, "prompt"),
    ("prompt null", {**TEXT, "prompt": None}, 400, "prompt"),
    ("prompt empty", {**TEXT, "prompt": ""}, 400, "prompt"),
    ("prompt an empty list", {**TEXT, "prompt": []}, 400, "prompt"),
    ("prompt of mixed things", {**TEXT, "prompt": ["a", 1]}, 400, "prompt[1]"),
    ("prompt of bools", {**TEXT, "prompt": [True]}, 400, "prompt"),
    ("prompt id negative", {**TEXT, "prompt": [-1]}, 400, "prompt[0]"),
    ("prompt id outside", {**TEXT, "prompt": [300]}, 400, "prompt"),
    ("prompt id a fraction", {**TEXT, "prompt": [1, 1.5]}, 400, "prompt[1]"),
    ("prompts too many", {**TEXT, "prompt": ["a"] * 129}, 400, "prompt"),
    ("one prompt empty", {**TEXT, "prompt": [[1], []]}, 400, "prompt[1]"),
    ("prompt over context", {**TEXT, "prompt": [9] * 500}, 400, None),
    ("one token over context", {**TEXT, "prompt": [9] * 500, "max_tokens": 13}, 400, None),
    ("prompt over characters", {**TEXT, "prompt": "a" * 5000}, 400, "prompt"),
    ("echo a text", {**TEXT, "echo": "yes"}, 400, "echo"),
    ("best of", {**TEXT, "best_of": 2}, 400, None),
    ("choices too many", {**TEXT, "prompt": ["a"] * 65, "n": 2}, 400, "n"),
    ("suffix", {**TEXT, "suffix": "x"}, 400, "suffix"),
    ("logprobs too many", {**TEXT, "logprobs": 21}, 400, "logprobs"),
    ("logprobs a bool", {**TEXT, "logprobs": True}, 400, "logprobs"),
    ("messages", {**TEXT, "messages": USER}, 400, "messages"),
]
RAW: list[tuple[str, bytes, dict[str, str], int]] = [
    ("nothing", b"", {}, 400),
    ("half", b'{"model": "m"', {}, 400),
    ("not UTF-8", b'{"model": "\xff"}', {}, 400),
    ("a lone surrogate", b'{"model": "\\ud800"}', {}, 400),
    ("NaN", b'{"model": "m", "temperature": NaN}', {}, 400),
    ("infinity", b'{"model": "m", "prompt": "a", "temperature": 1e999}', {}, 400),
    ("deep", b'{"metadata": ' + b"[" * 20000 + b"]" * 20000 + b"}", {}, 400),
    ("a long number", b'{"max_tokens": ' + b"9" * 20000 + b"}", {}, 400),
    ("too large", b" " * (MAX_BODY + 1), {}, 413),
    ("too large by its own word", b"{}", {"content-length": "99999999999999999999999"}, 413),
    ("a form", b"model=m", {"content-type": "application/x-www-form-urlencoded"}, 415),
    ("text", b"{}", {"content-type": "text/plain"}, 415),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    write_tokenizer(path, 300)
    return path


@pytest.fixture
def hub(folder: Path) -> FakeHub:
    cards = [card("m", folder), card("broken", folder, failed="no such file")]
    return FakeHub(cards, lambda _: spoken([9]))


def send(hub: FakeHub, method: str, path: str, **request: Any) -> httpx.Response:
    async def scenario() -> httpx.Response:
        async with asgi_client(hub, max_body_bytes=MAX_BODY) as client:
            return await client.request(method, path, **request)

    return asyncio.run(scenario())


def check_error(reply: httpx.Response, hub: FakeHub, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert hub.opened == []
    assert reply.headers["x-request-id"]
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        pytest.param(path, *case[1:], id=f"{kind}: {case[0]}")
        for kind, path, cases in (
            ("chat", "/v1/chat/completions", CHATS),
            ("text", "/v1/completions", TEXTS),
        )
        for case in cases
    ],
)
def test_a_bad_body_is_refused(
    hub: FakeHub, path: str, body: Any, status: int, param: str | None
) -> None:
    error = check_error(send(hub, "POST", path, json=body), hub, status)
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "headers", "status"), [pytest.param(*case[1:], id=case[0]) for case in RAW]
)
def test_a_body_that_is_no_request_is_refused(
    hub: FakeHub, body: bytes, headers: dict[str, str], status: int
) -> None:
    headers = {"content-type": "application/json", **headers}
    check_error(send(hub, "POST", "/v1/completions", content=body, headers=headers), hub, status)


def test_a_body_without_a_length_is_read_no_further_than_the_bound(hub: FakeHub) -> None:
    given = 0

    async def endless() -> Any:
        nonlocal given
        while given < 100 * MAX_BODY:
            given += 1 << 12
            yield b" " * (1 << 12)

    headers = {"content-type": "application/json"}
    reply = send(hub, "POST", "/v1/completions", content=endless(), headers=headers)
    check_error(reply, hub, 413)
    assert given <= MAX_BODY + (1 << 13)


def test_a_client_that_leaves_while_it_sends_is_no_error(
    hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> str:
        async with live(hub) as server, httpx.AsyncClient(base_url=server.url) as client:
            host, port = server.url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            await writer.drain()
            writer.transport.abort()
            while True:
                text = (await client.get("/metrics")).text
                if 'outcome="cancelled"' in text:
                    return text

    asyncio.run(scenario())
    assert hub.opened == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nope", 404),
        ("GET", "/", 404),
        ("GET", "/v1/models/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/completions/", 404),
    ],
)
def test_a_wrong_route_is_refused(hub: FakeHub, method: str, path: str, status: int) -> None:
    check_error(send(hub, method, path), hub, status)


def test_neutral_values_of_what_is_not_served_are_accepted(hub: FakeHub) -> None:
    refused = set(UNSUPPORTED) - set(ChatRequest.model_fields)
    neutral = {name: UNSUPPORTED[name][-1] for name in refused}
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    nulls = {"stop": None, "seed": None, "temperature": None, "max_tokens": None}
    body = {**CHAT, **neutral, **ignored, **nulls}
    assert send(hub, "POST", "/v1/chat/completions", json=body).status_code == 200
    body = {**CHAT, **dict.fromkeys(UNSUPPORTED)}
    assert send(hub, "POST", "/v1/chat/completions", json=body).status_code == 200


def test_prompt_and_answer_may_fill_the_context(hub: FakeHub) -> None:
    body = {**TEXT, "prompt": [9] * 500, "max_tokens": 12}
    assert send(hub, "POST", "/v1/completions", json=body).status_code == 200
    assert send(hub, "POST", "/v1/chat/completions", json=said("a")).status_code == 200
    chat = hub.opened[1]
    assert len(chat.prompt) + chat.max_tokens == 512


def references_of(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [ref for item in value.values() for ref in references_of(item)]
    return [ref for item in value for ref in references_of(item)] if isinstance(value, list) else []


def test_the_openapi_document_holds_all_it_refers_to(hub: FakeHub) -> None:
    document = send(hub, "GET", "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models"} <= set(document["paths"])
    names = [ref.removeprefix("#/components/schemas/") for ref in references_of(document)]
    assert {"ChatRequest", "CompletionRequest", "Message", "Error"} <= set(names)
    assert set(names) <= set(document["components"]["schemas"])


def test_whole_numbers_may_be_written_as_fractions(hub: FakeHub) -> None:
    body = {**CHAT, "max_tokens": 5.0, "seed": -1.0, "top_k": -1}
    assert send(hub, "POST", "/v1/chat/completions", json=body).status_code == 200
    assert hub.opened[0].max_tokens == 5
    assert hub.opened[0].sampling.seed == (1 << 63) - 1
    assert hub.opened[0].sampling.top_k == 0


def test_a_request_id_is_echoed_if_it_is_a_plain_word(hub: FakeHub) -> None:
    reply = send(hub, "GET", "/v1/models", headers={"x-request-id": "abc-1"})
    assert reply.headers["x-request-id"] == "abc-1"
    reply = send(hub, "GET", "/v1/models", headers={"x-request-id": "a b<script>"})
    assert reply.headers["x-request-id"] != "a b<script>"


def test_nothing_of_a_prompt_is_logged(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    secret = "my secret words"
    body = {**CHAT, "messages": [{"role": "user", "content": secret}]}
    assert send(hub, "POST", "/v1/chat/completions", json=body).status_code == 200
    check = {**body, "temperature": secret}
    assert send(hub, "POST", "/v1/chat/completions", json=check).status_code == 400
    records = [record for record in caplog.records if record.name.startswith("weft")]
    assert records
    assert all(secret not in json.dumps(record.__dict__, default=str) for record in records)

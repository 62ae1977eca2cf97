"""The stock `openai` SDK for embeddings, responses, functions, structured output and retries."""

import asyncio
import base64
import json
import struct
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
from openai import AsyncOpenAI
from test_server_openai_sdk import talk

from support.fake_hub import FakeHub, card, obliging, spoken, tokens_of
from support.tiny import write_tokenizer
from weft.core.errors import QUEUE_FULL, REQUEST_FAILED, ReplyError
from weft.hub.base import Chunk

USER: Any = [{"role": "user", "content": "hi"}]
FUNCTION: dict[str, Any] = {
    "name": "f",
    "description": "Does f.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    write_tokenizer(path, 300)
    return path


def saying(folder: Path, text: str, **options: Any) -> FakeHub:
    said = obliging(tokens_of(folder, text), **options)
    return FakeHub([card("m", folder, context=4096)], said)


def test_embeddings(folder: Path) -> None:
    """Without a format the SDK asks for base64 and unpacks it."""
    hub = saying(folder, "")

    async def scenario(client: AsyncOpenAI) -> None:
        for form in ({}, {"encoding_format": "float"}):
            reply = await client.embeddings.create(model="m", input=["abcd", "xyz"], **form)  # type: ignore[call-overload]
            assert [entry.index for entry in reply.data] == [0, 1]
            for entry, new in zip(reply.data, hub.opened[-2:], strict=True):
                norm = sum(token**2 for token in new.prompt[:4]) ** 0.5
                assert entry.embedding == pytest.approx([t / norm for t in new.prompt[:4]])
            assert reply.usage.prompt_tokens == reply.usage.total_tokens == 7
        assert (await client.embeddings.create(model="m", input=[[5, 6], [7]])).data[1].index == 1
        with pytest.raises(openai.BadRequestError) as other:
            await client.embeddings.create(model="m", input="abcd", dimensions=7)
        assert other.value.param == "dimensions"
        assert await client.embeddings.create(model="m", input="abcd", dimensions=4)

    talk(hub, scenario)
    assert hub.opened[0].embed == "last" and hub.opened[0].max_tokens == 0


def test_the_mean_is_of_all_parts(folder: Path) -> None:
    parts = tuple(struct.pack("<2f", *values) for values in ((3.0, 0.0), (3.0, 8.0)))
    cards = [card("m", folder)]
    hub = FakeHub(cards, lambda _: [Chunk(embedding=parts, finish="stop")])

    async def scenario(client: AsyncOpenAI) -> None:
        reply = await client.embeddings.create(model="m", input="ab")
        assert reply.data[0].embedding == pytest.approx([0.6, 0.8])

    talk(hub, scenario)
    assert base64.b64encode(parts[0])


def test_a_large_batch_leaves_the_pool_room(folder: Path) -> None:
    live, most = 0, 0

    def script(new: Any) -> Any:
        nonlocal live, most
        live += 1
        most = max(most, live - len(hub.ended))
        return [Chunk(), Chunk(embedding=(struct.pack("<f", 1.0),), finish="stop")]

    hub = FakeHub([card("m", folder)], script)

    async def scenario(client: AsyncOpenAI) -> None:
        reply = await client.embeddings.create(model="m", input=["a"] * 200)
        assert len(reply.data) == 200

    talk(hub, scenario)
    assert 1 < most <= 33


def test_tools_of_a_chat(folder: Path) -> None:
    async def scenario(client: AsyncOpenAI) -> None:
        tools: Any = [{"type": "function", "function": FUNCTION}]
        reply = await client.chat.completions.create(model="m", messages=USER, tools=tools)
        message = reply.choices[0].message
        assert reply.choices[0].finish_reason == "tool_calls"
        (call,) = message.tool_calls or []
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("f", {"a": 1})
        history: Any = [
            *USER,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "2"},
        ]
        assert await client.chat.completions.create(model="m", messages=history, tools=tools)
        async with client.chat.completions.stream(
            model="m", messages=USER, tools=tools, tool_choice="required"
        ) as stream:
            names = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in names
        (call,) = final.choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments) == {"a": 1}

    hub = saying(folder, CALL)
    talk(hub, scenario)
    assert hub.opened[-1].sampling.grammar is not None


class Answer(pydantic.BaseModel):
    a: int


def test_structured_output_is_parsed(folder: Path) -> None:
    async def scenario(client: AsyncOpenAI) -> None:
        chat = await client.chat.completions.parse(model="m", messages=USER, response_format=Answer)
        assert chat.choices[0].message.parsed == Answer(a=1)
        response = await client.responses.parse(model="m", input="hi", text_format=Answer)
        assert response.output_parsed == Answer(a=1)

    hub = saying(folder, '{"a": 1}')
    talk(hub, scenario)
    kinds = [new.sampling.grammar.kind for new in hub.opened if new.sampling.grammar]
    assert kinds == ["json_schema", "json_schema"]


def test_a_response(folder: Path) -> None:
    async def scenario(client: AsyncOpenAI) -> None:
        reply = await client.responses.create(
            model="m", input="hi", instructions="be kind", metadata={"a": "b"}, store=False
        )
        assert reply.output_text == "well met"
        assert (reply.status, reply.metadata) == ("completed", {"a": "b"})
        assert reply.usage is not None
        assert reply.usage.output_tokens == len(tokens_of(folder, "well met"))
        assert reply.usage.input_tokens_details.cached_tokens > 0
        short = await client.responses.create(model="m", input="hi", max_output_tokens=2)
        assert short.status == "incomplete"
        assert short.incomplete_details is not None
        assert short.incomplete_details.reason == "max_output_tokens"
        for field, value in (("store", True), ("previous_response_id", "r"), ("background", True)):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.create(model="m", input="hi", **{field: value})  # type: ignore[call-overload]
            assert (refused.value.param, refused.value.code) == (field, "unsupported_parameter")

    hub = saying(folder, "well met")
    talk(hub, scenario)
    assert hub.opened[0].prompt == tokens_of(
        folder, "<s><|user|>be kind<|end|><|user|>hi<|end|><|assistant|>"
    )


def test_a_streamed_response_has_its_events_in_order(folder: Path) -> None:
    async def scenario(client: AsyncOpenAI) -> None:
        async with client.responses.stream(model="m", input="hi") as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        assert final.output_text == "ab"
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [event.type for event in events] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]

    talk(saying(folder, "ab"), scenario)


def test_a_response_calls_functions_and_hears_of_them(folder: Path) -> None:
    async def scenario(client: AsyncOpenAI) -> None:
        tools: Any = [{"type": "function", **FUNCTION, "strict": True}]
        async with client.responses.stream(model="m", input="hi", tools=tools) as stream:
            names = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert "response.function_call_arguments.done" in names
        message, call = final.output
        assert message.type == "message" and call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("f", {"a": 1})
        items: Any = [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "id": "rs", "summary": []},
            message.model_dump(exclude_none=True),
            {
                "type": "function_call",
                "call_id": call.call_id,
                "name": call.name,
                "arguments": call.arguments,
            },
            {"type": "function_call_output", "call_id": call.call_id, "output": "2"},
        ]
        assert await client.responses.create(model="m", input=items, tools=tools)
        bad = [*items[:3], {**items[3], "arguments": "["}]
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(model="m", input=bad, tools=tools)

    talk(saying(folder, "see " + CALL), scenario)


def test_what_came_out_goes_in_again(folder: Path) -> None:
    """As the SDK's own examples do: output items and messages are appended to the input."""

    async def scenario(client: AsyncOpenAI) -> None:
        tools: Any = [{"type": "function", **FUNCTION}]
        items: Any = [{"role": "user", "content": "hi"}]
        first = await client.responses.create(model="m", input=items, tools=tools)
        items += first.output
        call = first.output[-1]
        assert call.type == "function_call"
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "2"})
        assert await client.responses.create(model="m", input=items, tools=tools)
        messages: Any = [*USER]
        chat_tools: Any = [{"type": "function", "function": FUNCTION}]
        create = client.chat.completions.create
        reply = await create(model="m", messages=messages, tools=chat_tools)
        message = reply.choices[0].message
        messages.append(message)
        for made in message.tool_calls or []:
            messages.append({"role": "tool", "tool_call_id": made.id, "content": "2"})
        assert await create(model="m", messages=messages, tools=chat_tools)

    talk(saying(folder, "see " + CALL), scenario)


def test_a_response_that_breaks_says_so(folder: Path) -> None:
    error = ReplyError(code=REQUEST_FAILED, message="the worker died too often")
    steps = [Chunk(tokens=(9,)), Chunk(finish="error", error=error)]
    hub = FakeHub([card("m", folder)], lambda _: steps)

    async def scenario(client: AsyncOpenAI) -> None:
        stream = await client.responses.create(model="m", input="hi", stream=True)
        last = [event async for event in stream][-1]
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert "died too often" in last.response.error.message

    talk(hub, scenario)


def test_the_sdk_waits_and_tries_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits as long as Retry-After says: a second here, which the test does not sleep."""
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(delay: float, *rest: Any) -> Any:
        if delay >= 0.1:
            waits.append(delay)
            delay = 0
        return await sleep(delay, *rest)

    calls = 0

    def script(_: Any) -> Any:
        nonlocal calls
        calls += 1
        return ReplyError(code=QUEUE_FULL, message="full") if calls < 3 else spoken([9])

    async def scenario(client: AsyncOpenAI) -> None:
        monkeypatch.setattr("openai._base_client.anyio.sleep", noted)
        patient = client.with_options(max_retries=3)
        assert await patient.chat.completions.create(model="m", messages=USER)

    talk(FakeHub([card("m", folder)], script), scenario)
    assert calls == 3
    assert waits == [1.0, 1.0]

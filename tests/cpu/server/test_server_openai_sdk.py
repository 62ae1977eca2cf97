"""The stock `openai` SDK against a frontend on a real port."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from support.fake_hub import FakeHub, Hold, card, spoken, tokens_of
from support.live import live
from support.tiny import write_tokenizer
from weft.core.errors import QUEUE_FULL, ReplyError
from weft.hub.base import Chunk

USER: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    write_tokenizer(path, 300)
    return path


def talk(hub: FakeHub, scenario: Callable[[AsyncOpenAI], Awaitable[None]]) -> None:
    async def main() -> None:
        async with (
            live(hub) as server,
            AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            await scenario(client)

    asyncio.run(main())


def speaking(folder: Path, text: str) -> FakeHub:
    ids = tokens_of(folder, text)
    return FakeHub([card("m", folder), card("org/b:1", folder)], lambda _: spoken(ids))


def test_models(folder: Path) -> None:
    async def scenario(client: AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == ["m", "org/b:1"]
        assert (await client.models.retrieve("org/b:1")).id == "org/b:1"

    talk(speaking(folder, ""), scenario)


def test_chat(folder: Path) -> None:
    async def scenario(client: AsyncOpenAI) -> None:
        reply = await client.chat.completions.create(
            model="m",
            messages=[
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ],
            max_completion_tokens=20,
            extra_body={"ignore_eos": True, "top_k": 5},
        )
        assert reply.choices[0].message.content == "well met 🙂"
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage is not None and reply.usage.completion_tokens > 3
        assert reply._request_id

    hub = speaking(folder, "well met 🙂")
    talk(hub, scenario)
    assert hub.opened[0].ignore_eos
    assert hub.opened[0].sampling.top_k == 5


def test_chat_streamed(folder: Path) -> None:
    async def scenario(client: AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model="m", messages=USER, stream=True, stream_options={"include_usage": True}
        )
        text, roles, usage = "", [], None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                roles += [choice.delta.role] if choice.delta.role else []
        assert (text, roles) == ("naïve", ["assistant"])
        assert usage is not None and usage.completion_tokens == len(tokens_of(folder, "naïve"))

    talk(speaking(folder, "naïve"), scenario)


def test_the_streaming_helper(folder: Path) -> None:
    """It accumulates chunks into a completion and checks their order on the way."""

    async def scenario(client: AsyncOpenAI) -> None:
        async with client.chat.completions.stream(model="m", messages=USER) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "one two"
        assert final.choices[0].finish_reason == "stop"

    talk(speaking(folder, "one two"), scenario)


def test_completions(folder: Path) -> None:
    async def scenario(client: AsyncOpenAI) -> None:
        reply = await client.completions.create(model="m", prompt=["a", "b"], stop="wo")
        assert [choice.text for choice in reply.choices] == ["one t", "one t"]
        stream = await client.completions.create(model="m", prompt=[9, 10], stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "one two"

    talk(speaking(folder, "one two"), scenario)


def test_errors_have_their_types(folder: Path) -> None:
    full = ReplyError(code=QUEUE_FULL, message="full")
    hub = FakeHub([card("m", folder)], lambda _: full)

    async def scenario(client: AsyncOpenAI) -> None:
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError) as missing:
            await create(model="nope", messages=USER)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model="m", messages=USER, temperature=9)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as audio:
            await create(model="m", messages=USER, modalities=["audio"])
        assert audio.value.code == "unsupported_parameter"
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as limit:
                await create(model="m", messages=USER, stream=stream)
            assert limit.value.response.headers["retry-after"] == "1"

    talk(hub, scenario)


def test_an_error_in_a_stream_is_raised(folder: Path) -> None:
    error = ReplyError(code="request_failed", message="the worker died too often")
    hub = FakeHub(
        [card("m", folder)], lambda _: [Chunk(tokens=(9,)), Chunk(finish="error", error=error)]
    )

    async def scenario(client: AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(model="m", messages=USER, stream=True)
        with pytest.raises(openai.APIError, match="died too often"):
            async for _ in stream:
                pass

    talk(hub, scenario)


def test_closing_a_stream_cancels(folder: Path) -> None:
    hub = FakeHub([card("m", folder)], lambda _: [Chunk(tokens=(9,)), Hold()])

    async def scenario(client: AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(model="m", messages=USER, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await asyncio.wait_for(hub.cancel_seen.wait(), 10)
        assert hub.cancelled == [1]

    talk(hub, scenario)

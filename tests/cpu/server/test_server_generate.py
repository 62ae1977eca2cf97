"""Chat and completions over the wire, against a hub that plays scripts."""

import asyncio
import json
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.fake_hub import FakeHub, Hold, card, spoken, tokens_of
from support.live import asgi_client, live
from support.tiny import write_tokenizer
from weft.core.errors import HOLD_DEADLINE, QUEUE_FULL, ReplyError
from weft.hub.base import Chunk
from weft.server import routes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    write_tokenizer(path, 300)
    return path


def chat(text: str = "hi", **extra: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **extra}


def events_of(body: str) -> list[Any]:
    lines = [line for line in body.split("\n") if line.startswith("data: ")]
    return [json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]" for line in lines]


def test_a_chat_is_rendered_tokenised_and_answered(folder: Path) -> None:
    hub = FakeHub([card("m", folder)], lambda _: spoken(tokens_of(folder, "hello there")))

    async def scenario() -> None:
        async with asgi_client(hub) as client:
            reply = await client.post("/v1/chat/completions", json=chat(seed=7, temperature=0.5))
        assert reply.status_code == 200
        body = reply.json()
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["content"] == "hello there"
        assert body["choices"][0]["finish_reason"] == "stop"
        usage = body["usage"]
        assert usage["prompt_tokens"] == len(hub.opened[0].prompt)
        assert usage["completion_tokens"] == len(tokens_of(folder, "hello there"))
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    asyncio.run(scenario())
    new = hub.opened[0]
    assert new.prompt == tokens_of(folder, "<s><|user|>hi<|end|><|assistant|>")
    assert (new.sampling.seed, new.sampling.temperature) == (7, 0.5)
    assert new.max_tokens == 512 - len(new.prompt)


def test_a_streamed_chat_has_role_text_finish_usage_and_done(folder: Path) -> None:
    ids = tokens_of(folder, "naïve 🙂")
    hub = FakeHub([card("m", folder)], lambda _: spoken(ids, finish="length", per_chunk=2))

    async def scenario() -> list[Any]:
        async with asgi_client(hub) as client:
            body = chat(stream=True, stream_options={"include_usage": True})
            reply = await client.post("/v1/chat/completions", json=body)
        assert reply.headers["content-type"].startswith("text/event-stream")
        return events_of(reply.text)

    events = asyncio.run(scenario())
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["usage"] is None for event in events[:-2])
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == len(ids)
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-2])
    assert text == "naïve 🙂"
    assert [e["choices"][0]["finish_reason"] for e in events[:-2]][-1] == "length"
    assert len({event["id"] for event in events[:-1]}) == 1


def test_a_completion_takes_text_ids_and_lists_of_both(folder: Path) -> None:
    def script(new: Any) -> Any:
        return spoken(new.prompt, finish="length")  # an echo

    hub = FakeHub([card("m", folder)], script)
    ids = list(tokens_of(folder, "abc"))

    async def scenario() -> list[Any]:
        async with asgi_client(hub) as client:
            texts = []
            for prompt in ("abc", ids, ["abc", "xyz"], [ids, [9, 10]]):
                reply = await client.post("/v1/completions", json={"model": "m", "prompt": prompt})
                assert reply.status_code == 200, reply.text
                texts.append([c["text"] for c in reply.json()["choices"]])
            return texts

    assert asyncio.run(scenario()) == [["abc"], ["abc"], ["abc", "xyz"], ["abc", "#$"]]
    assert hub.opened[0].max_tokens == 16
    assert hub.opened[0].sampling.temperature == 1.0
    seeds = {new.sampling.seed for new in hub.opened}
    assert len(seeds) == len(hub.opened)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_streamed_list_of_prompts_keeps_choices_apart(folder: Path) -> None:
    hub = FakeHub([card("m", folder)], lambda new: spoken(new.prompt * 3))

    async def scenario() -> list[Any]:
        async with asgi_client(hub) as client:
            body = {"model": "m", "prompt": ["ab", "cd", "ef"], "stream": True}
            return events_of((await client.post("/v1/completions", json=body)).text)

    events = asyncio.run(scenario())
    texts = {0: "", 1: "", 2: ""}
    for event in events[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == {0: "ababab", 1: "cdcdcd", 2: "efefef"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("per_chunk", [1, 2, 5, 50])
def test_a_stop_string_cuts_the_text_and_cancels(
    folder: Path, stream: bool, per_chunk: int
) -> None:
    """The same answer and the same count of tokens however the tokens were grouped."""
    ids = tokens_of(folder, "one two STOP three")
    hub = FakeHub(
        [card("m", folder)],
        lambda _: [*spoken(ids, per_chunk=per_chunk)[:-1], Hold()],
    )

    async def scenario() -> tuple[str, str, int]:
        async with asgi_client(hub) as client:
            body = chat(stop=["STOP"], stream=stream)
            if stream:
                body["stream_options"] = {"include_usage": True}
            reply = await client.post("/v1/chat/completions", json=body)
        if not stream:
            whole = reply.json()
            choice = whole["choices"][0]
            used = whole["usage"]["completion_tokens"]
            return choice["message"]["content"], choice["finish_reason"], used
        events = events_of(reply.text)
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-2])
        reason = events[-3]["choices"][0]["finish_reason"]
        return text, reason, events[-2]["usage"]["completion_tokens"]

    upto = len(tokens_of(folder, "one two STOP"))
    assert asyncio.run(scenario()) == ("one two ", "stop", upto)
    assert hub.cancelled == [1]


def test_stop_strings_wait_for_min_tokens(folder: Path) -> None:
    ids = tokens_of(folder, "xaxaxa")
    hub = FakeHub([card("m", folder)], lambda _: spoken(ids, per_chunk=3))

    async def scenario() -> str:
        async with asgi_client(hub) as client:
            body = chat(stop="x", min_tokens=3, max_tokens=50)
            reply = await client.post("/v1/chat/completions", json=body)
        return str(reply.json()["choices"][0]["message"]["content"])

    assert asyncio.run(scenario()) == "xa"


def test_token_ids_are_returned_when_asked_for(folder: Path) -> None:
    hub = FakeHub([card("m", folder)], lambda _: spoken([9, 10, 11]))

    async def scenario() -> list[Any]:
        async with asgi_client(hub) as client:
            body = {"model": "m", "prompt": "a", "return_token_ids": True}
            whole = (await client.post("/v1/completions", json=body)).json()
            reply = await client.post("/v1/completions", json={**body, "stream": True})
        streamed = [e["choices"][0]["token_ids"] for e in events_of(reply.text)[:-1]]
        joined = [token for tokens in streamed for token in tokens]
        return [whole["choices"][0]["token_ids"], joined]

    assert asyncio.run(scenario()) == [[9, 10, 11]] * 2


def test_a_model_without_a_tokenizer_is_served_by_ids(tmp_path: Path) -> None:
    hub = FakeHub([card("m", tmp_path)], lambda _: spoken([5, 6]))

    async def scenario() -> None:
        async with asgi_client(hub) as client:
            body = {"model": "m", "prompt": [1, 2], "return_token_ids": True}
            reply = await client.post("/v1/completions", json=body)
            assert reply.json()["choices"][0]["token_ids"] == [5, 6]
            assert reply.json()["choices"][0]["text"] == ""
            refused = await client.post("/v1/completions", json={"model": "m", "prompt": "a"})
            assert refused.status_code == 400
            assert "tokenizer.json" in refused.json()["error"]["message"]

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status", "retry"), [(QUEUE_FULL, 429, "1"), (HOLD_DEADLINE, 503, "5")]
)
def test_a_refusal_has_its_status_and_retry_after(
    folder: Path, stream: bool, code: str, status: int, retry: str
) -> None:
    error = ReplyError(code=code, message="come back")
    scripts: list[Any] = [
        lambda _: error,
        lambda _: [Chunk(finish="error", error=error)],
    ]

    async def scenario(script: Any) -> httpx.Response:
        async with asgi_client(FakeHub([card("m", folder)], script)) as client:
            return await client.post("/v1/chat/completions", json=chat(stream=stream))

    for script in scripts:
        reply = asyncio.run(scenario(script))
        assert reply.status_code == status
        assert reply.headers["retry-after"] == retry
        assert reply.json()["error"]["code"] == code


def test_a_refused_second_prompt_gives_the_first_one_back(folder: Path) -> None:
    full = ReplyError(code=QUEUE_FULL, message="full")
    hub = FakeHub([card("m", folder)], lambda new: full if len(new.prompt) == 2 else [Hold()])

    async def counted() -> tuple[int, str]:
        async with asgi_client(hub) as client:
            body = {"model": "m", "prompt": [[1], [1, 2]]}
            status = (await client.post("/v1/completions", json=body)).status_code
            return status, (await client.get("/metrics")).text

    status, text = asyncio.run(counted())
    assert status == 429
    assert hub.cancelled == [1]
    assert 'weft_requests_total{model="m",outcome="refused"} 2.0' in text


def test_an_error_after_the_headers_is_an_event_and_the_end(folder: Path) -> None:
    error = ReplyError(code="request_failed", message="the worker died too often")
    hub = FakeHub(
        [card("m", folder)], lambda _: [Chunk(tokens=(9,)), Chunk(finish="error", error=error)]
    )

    async def scenario() -> list[Any]:
        async with asgi_client(hub) as client:
            reply = await client.post("/v1/chat/completions", json=chat(stream=True))
            assert reply.status_code == 200
            return events_of(reply.text)

    events = asyncio.run(scenario())
    assert events[-1]["error"]["code"] == "request_failed"
    assert "[DONE]" not in events


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_that_breaks_is_a_500_without_details(folder: Path, stream: bool) -> None:
    hub = FakeHub([card("m", folder)], lambda _: [RuntimeError("secret detail")])

    async def scenario() -> httpx.Response:
        async with asgi_client(hub) as client:
            return await client.post("/v1/chat/completions", json=chat(stream=stream))

    reply = asyncio.run(scenario())
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert "secret" not in reply.text
    assert hub.cancelled == [1]


def test_a_held_stream_gets_headers_and_comments_before_its_first_token(folder: Path) -> None:
    async def scenario() -> None:
        hold = Hold()
        ids = tokens_of(folder, "now")
        hub = FakeHub([card("m", folder)], lambda _: [hold, *spoken(ids)])
        async with (
            live(hub, keepalive_s=0.05) as server,
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as reply,
        ):
            assert reply.status_code == 200
            lines = reply.aiter_lines()
            comments = 0
            async for line in lines:
                comments += line == ": weft: held while the model comes in"
                if comments == 3:
                    hold.release()
                    break
            rest = [line async for line in lines]
        events = events_of("\n".join(rest))
        assert events[-1] == "[DONE]"
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
        assert text == "now"

    asyncio.run(scenario())


def test_the_headers_bring_a_comment_that_says_why_nothing_follows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.server.answer.HEADER_WAIT_S", 0.01)

    async def scenario() -> str:
        hub = FakeHub([card("m", folder)], lambda _: [Hold()])
        async with (
            live(hub, keepalive_s=3600) as server,
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as reply,
        ):
            return await anext(reply.aiter_lines())

    assert asyncio.run(scenario()) == ": weft: held while the model comes in"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_cancelled_in_the_hub(folder: Path, stream: bool) -> None:
    async def scenario() -> None:
        hold = Hold()
        hub = FakeHub([card("m", folder)], lambda _: [Chunk(tokens=(9,)), hold])
        async with live(hub) as server:
            async with httpx.AsyncClient(base_url=server.url) as client:
                post = asyncio.create_task(
                    client.post("/v1/chat/completions", json=chat(stream=stream))
                )
                await hold.reached.wait()
                post.cancel()
                await asyncio.wait({post})
            await asyncio.wait_for(hub.cancel_seen.wait(), 10)
        assert hub.cancelled == [1]

    asyncio.run(scenario())


def test_a_slow_reader_leaves_the_rest_in_the_hub(folder: Path) -> None:
    """The hub is asked for the next chunk when the last one was taken by the connection."""

    async def scenario() -> None:
        chunks = 200_000  # far more than the buffers of a connection hold
        hub = FakeHub([card("m", folder)], lambda _: [Chunk(tokens=(9,))] * chunks)
        async with live(hub) as server:
            host, port = server.url.removeprefix("http://").split(":")
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            sock.connect((host, int(port)))
            reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 12)
            body = json.dumps(chat(stream=True)).encode()
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                f"X-Request-Id: {'long' * 32}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            last = -1
            while hub.pulled != last or last == 0:  # until the connection is full
                last = hub.pulled
                for _ in range(200):
                    await asyncio.sleep(0)
            writer.transport.abort()
            assert 0 < hub.pulled < chunks
            await asyncio.wait_for(hub.cancel_seen.wait(), 10)
            del reader

    asyncio.run(scenario())


def test_stopping_ends_streams_with_an_error_event(folder: Path) -> None:
    async def scenario() -> list[Any]:
        hold = Hold()
        hub = FakeHub([card("m", folder)], lambda _: [Chunk(tokens=(9,)), hold])
        async with (
            live(hub, grace_s=0.1) as server,
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as reply,
        ):
            await hold.reached.wait()
            server.stop.set()
            text = "\n".join([line async for line in reply.aiter_lines()])
            await server.task
        assert hub.cancelled == [1]
        return events_of(text)

    assert asyncio.run(scenario())[-1]["error"]["code"] == "draining"


def test_stopping_lets_answers_end_and_refuses_new_ones(folder: Path) -> None:
    async def scenario() -> None:
        hold = Hold()
        hub = FakeHub([card("m", folder)], lambda _: [hold, *spoken([9])])
        async with (
            live(hub, grace_s=30) as server,
            httpx.AsyncClient(base_url=server.url) as client,
        ):
            first = asyncio.create_task(client.post("/v1/chat/completions", json=chat()))
            await hold.reached.wait()
            server.stop.set()
            ready = await client.get("/ready")
            while ready.status_code == 200:
                ready = await client.get("/ready")
            late = await client.post("/v1/chat/completions", json=chat())
            assert late.status_code == 503
            assert late.json()["error"]["code"] == "draining"
            assert "retry-after" in late.headers
            hold.release()
            assert (await first).status_code == 200
            await server.task

    asyncio.run(scenario())


def test_a_large_body_is_parsed_aside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the event loop's thread: other streams go on meanwhile."""
    threads: list[str] = []
    real = routes.decode_json

    def noted(body: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return real(body)

    monkeypatch.setattr(routes, "decode_json", noted)
    hub = FakeHub([card("m", folder, context=1 << 16)], lambda _: spoken([9]))

    async def scenario() -> None:
        async with asgi_client(hub) as client:
            for prompt in ([9] * 50_000, [9]):
                body = {"model": "m", "prompt": prompt}
                assert (await client.post("/v1/completions", json=body)).status_code == 200
            bad = {"model": "m", "prompt": [9] * 50_000 + [-1]}
            assert (await client.post("/v1/completions", json=bad)).status_code == 400

    asyncio.run(scenario())
    assert [name.startswith("weft-text") for name in threads] == [True, False, True]

"""Connections within bounds: their number, their patience, their pace."""

import asyncio
import json
import resource
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.fake_hub import FakeHub, Hold, card, spoken
from support.live import live
from support.tiny import write_tokenizer
from weft.config.server_config import ServerConfig
from weft.hub.base import Chunk
from weft.server import connection
from weft.server.serve import SPARE_DESCRIPTORS, raise_descriptor_limit

FULL_CHUNKS = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, 300)
    return folder


def request_bytes(**more: Any) -> bytes:
    body = json.dumps({"model": "m", "prompt": [5], "max_tokens": 400, **more}).encode()
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {'long' * 32}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


async def connect(url: str) -> socket.socket:
    """With a small buffer, so that what is not read is soon felt at the other end."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, address(url))
    return sock


async def closed(sock: socket.socket) -> bytes:
    """What still comes until the other end hangs up."""
    loop = asyncio.get_running_loop()
    data = b""
    try:
        while piece := await loop.sock_recv(sock, 1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_a_reader_that_takes_nothing_is_cut_and_its_request_cancelled(folder: Path) -> None:
    hub = FakeHub([card("m", folder)], lambda _: [Chunk(tokens=(9,))] * FULL_CHUNKS)

    async def scenario() -> None:
        async with live(hub, server=ServerConfig(slow_reader_s=0.3)) as server:
            with await connect(server.url) as sock:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(sock, request_bytes(stream=True))
                await hub.cancel_seen.wait()
                assert 0 < hub.pulled < FULL_CHUNKS
                most = 4 * connection.SEND_BUFFER_BYTES + 2 * connection.WRITE_BUFFER_BYTES
                assert hub.pulled * 200 < most, "more was written than the buffers may hold"
                await closed(sock)

    asyncio.run(scenario())


def test_one_that_leaves_a_whole_answer_unread_is_cut_too(folder: Path) -> None:
    """Its request is done, nobody writes any more: only the connection is left."""
    text = spoken([9] * 100_000, per_chunk=256)
    hub = FakeHub([card("m", folder, context=1 << 20)], lambda _: text)

    async def scenario() -> None:
        async with live(hub, server=ServerConfig(slow_reader_s=0.3)) as server:
            with await connect(server.url) as sock:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(sock, request_bytes(return_token_ids=True))
                async with httpx.AsyncClient(base_url=server.url) as client:
                    while not hub.ended:
                        await client.get("/health")
                # It never reads; the end of the server waits for nobody who is cut.
                while not cut(sock):
                    await asyncio.sleep(0.01)

    asyncio.run(scenario())


def cut(sock: socket.socket) -> bool:
    """Reset by the other end, without reading from it."""
    tcp_close = b"\x07"
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == tcp_close


def test_a_slow_reader_that_goes_on_is_waited_for(folder: Path) -> None:
    count = 1500
    hub = FakeHub([card("m", folder)], lambda _: spoken([9] * count))

    async def scenario() -> bytes:
        async with live(hub, server=ServerConfig(slow_reader_s=0.4)) as server:
            with await connect(server.url) as sock:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(sock, request_bytes(stream=True))
                data = b""
                while b"[DONE]" not in data:
                    data += await loop.sock_recv(sock, 1 << 14)
                    await asyncio.sleep(0.02)
                return data

    data = asyncio.run(scenario())
    assert data.count(b"data: {") == count + 1
    assert hub.cancelled == []


def test_a_connection_that_asks_nothing_is_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that drips a byte of its headers now and then, at first or after an answer."""
    bounds = connection.Bounds

    def impatient(**kwargs: Any) -> Any:
        return bounds(**kwargs, first_request_s=0.2, next_request_s=0.2)

    monkeypatch.setattr("weft.server.serve.Bounds", impatient)
    hub = FakeHub([card("m", folder)], lambda _: spoken([9]))

    async def scenario() -> None:
        async with live(hub) as server:
            loop = asyncio.get_running_loop()
            with await connect(server.url) as silent:
                assert await closed(silent) == b""
            for first in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
                with await connect(server.url) as dripping:
                    await loop.sock_sendall(dripping, first)
                    ended = asyncio.create_task(closed(dripping))
                    while not ended.done():
                        try:
                            await loop.sock_sendall(dripping, b"G")
                        except OSError:
                            break
                        await asyncio.sleep(0.05)
                    assert b"200 OK" in await ended if first else await ended == b""

    asyncio.run(scenario())


def test_connections_are_counted(folder: Path) -> None:
    hub = FakeHub([card("m", folder)], lambda _: spoken([9]))

    async def scenario() -> None:
        async with live(hub, server=ServerConfig(max_connections=2)) as server:
            loop = asyncio.get_running_loop()
            get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            first, second = await connect(server.url), await connect(server.url)
            with first, second:
                for sock in (first, second):
                    await loop.sock_sendall(sock, get)
                    assert b"200 OK" in await loop.sock_recv(sock, 1 << 16)
                with await connect(server.url) as third:
                    reply = await closed(third)
                    assert reply.startswith(b"HTTP/1.1 503") and b"Retry-After: 1" in reply
                    body = json.loads(reply.partition(b"\r\n\r\n")[2])
                    assert body["error"]["code"] == "too_many_connections"
                await loop.sock_sendall(first, get)
                assert b"200 OK" in await loop.sock_recv(first, 1 << 16)
            while True:  # room again, once the server has seen them go
                with await connect(server.url) as fourth:
                    await loop.sock_sendall(fourth, get)
                    if b"200 OK" in await loop.sock_recv(fourth, 1 << 16):
                        return

    asyncio.run(scenario())


def test_headers_are_bounded(folder: Path) -> None:
    hub = FakeHub([card("m", folder)], lambda _: spoken([9]))

    async def scenario() -> None:
        async with live(hub) as server:
            with await connect(server.url) as sock:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(sock, b"GET /health HTTP/1.1\r\nX: " + b"a" * 40_000)
                assert (await closed(sock)).startswith(b"HTTP/1.1 400")

    asyncio.run(scenario())


def test_descriptors_are_asked_for_and_missing_ones_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 100_000))
    assert raise_descriptor_limit(4096) == 4096
    assert asked == [(4096 + SPARE_DESCRIPTORS, 100_000)]
    assert raise_descriptor_limit(100) == 100 and len(asked) == 1
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 2048))
    assert raise_descriptor_limit(4096) == 2048 - SPARE_DESCRIPTORS
    assert "2048 descriptors" in caplog.text


def test_no_task_is_left_when_clients_are_gone(folder: Path) -> None:
    hub = FakeHub([card("m", folder)], lambda _: [Chunk(tokens=(9,)), Hold()])

    async def scenario() -> None:
        async with live(hub) as server:
            await asyncio.sleep(0)
            before = {task.get_name() for task in asyncio.all_tasks()}
            socks = [await connect(server.url) for _ in range(20)]
            loop = asyncio.get_running_loop()
            for sock in socks:
                await loop.sock_sendall(sock, request_bytes(stream=True))
            while len(hub.opened) < 20:
                await asyncio.sleep(0.01)
            for sock in socks:
                sock.close()
            while len(hub.cancelled) < 20:
                await asyncio.sleep(0.01)
            while {task.get_name() for task in asyncio.all_tasks()} - before:
                await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_a_prompt_still_being_tokenised_is_waited_for(folder: Path) -> None:
    """It passed the door before the signal: it ends as any other, and what comes after is 503."""
    import threading

    from weft.server.text import TextModel

    release, reached = threading.Event(), threading.Event()
    plain = TextModel.encode_prompt

    def slow(self: TextModel, *args: Any, **kwargs: Any) -> Any:
        reached.set()
        release.wait(20)
        return plain(self, *args, **kwargs)

    hub = FakeHub([card("m", folder)], lambda _: spoken([9]))

    async def scenario() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TextModel, "encode_prompt", slow)
            async with live(hub) as server, httpx.AsyncClient(base_url=server.url) as client:
                body = {"model": "m", "prompt": "hi"}
                early = asyncio.create_task(client.post("/v1/completions", json=body))
                await asyncio.to_thread(reached.wait, 20)
                server.stop.set()
                while (await client.get("/ready")).status_code != 503:
                    pass
                late = await client.post("/v1/completions", json=body)
                assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
                release.set()
                assert (await early).status_code == 200

    asyncio.run(scenario())

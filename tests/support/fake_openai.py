"""A small OpenAI-like server in a thread, whose every byte a test decides."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

Answer = Callable[[dict[str, Any]], AsyncIterator[bytes]]


def event(
    text: str | None = None,
    *,
    tokens: int | None = None,
    finish: str | None = None,
    prompt_tokens: int = 3,
) -> bytes:
    """One streamed chunk of a completion; `tokens` is the usage so far."""
    value: dict[str, Any] = {"id": "x", "choices": []}
    if text is not None:
        value["choices"] = [{"index": 0, "text": text, "finish_reason": finish}]
    if tokens is not None:
        value["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def whole_answer(body: dict[str, Any]) -> AsyncIterator[bytes]:
    """max_tokens tokens, one an event, with running usage."""
    total = body["max_tokens"]
    for i in range(total):
        yield event("w ", tokens=i + 1, finish="length" if i + 1 == total else None)
    yield event(tokens=total)
    yield DONE


class FakeOpenAI:
    """Serves GET pages from `pages` and POST /v1/completions with `answer`. `bodies` holds what
    was posted. Use as a context manager; `url` is its address."""

    def __init__(self, answer: Answer = whole_answer, status: int = 200) -> None:
        self.answer, self.status = answer, status
        self.pages: dict[str, list[Any]] = {
            "/v1/models": [{"data": [{"id": "a"}, {"id": "b", "max_model_len": 64}]}]
        }
        """Path -> answers, one a call, the last for ever. A missing path is 404."""
        self.bodies: list[dict[str, Any]] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "FakeOpenAI":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self._handlers: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._handlers:
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            length = [
                int(line.split(":")[1])
                for line in head.splitlines()
                if line.lower().startswith("content-length")
            ]
            raw = await reader.readexactly(length[0]) if length else b""
            if method == "GET":
                self._page(path, writer)
            else:
                await self._completion(json.loads(raw), writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the test is over
        finally:
            self._handlers.discard(task)
            writer.close()

    def _page(self, path: str, writer: asyncio.StreamWriter) -> None:
        answers = self.pages.get(path)
        if not answers:
            writer.write(_head(404, "application/json") + b'{"error": {"message": "no"}}')
            return
        value = answers.pop(0) if len(answers) > 1 else answers[0]
        writer.write(_head(200, "application/json") + json.dumps(value).encode())

    async def _completion(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bodies.append(body)
        writer.write(_head(self.status, "text/event-stream"))
        async for piece in self.answer(body):
            writer.write(piece)
            await writer.drain()


def _head(status: int, kind: str) -> bytes:
    return (f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n").encode()

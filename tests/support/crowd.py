"""A crowd of streaming clients on raw sockets, in a process of its own.

`python -m support.crowd HOST PORT` reads a JSON list of `Visitor`s from stdin and writes a JSON
list of `Seen`, in the same order. A thousand HTTP libraries would measure themselves.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

TESTS = Path(__file__).resolve().parents[1]
READ_BYTES = 1 << 16
SLOW_READ_BYTES = 4096
SLOW_PAUSE_S = 0.02
SLOW_LOGPROBS = 10
"""Of every token of a slow answer: it is larger than all buffers between however few events its
tokens come in, and on a slow machine they are few."""


class Visitor(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    kind: Literal["plain", "slow", "leaver", "stuck"] = "plain"
    """slow: small buffers and pauses; leaver: closes after `leave_after` bytes of the answer;
    stuck: never reads, and ends when the server hangs up."""
    leave_after: int = 0


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    status: int
    tokens: tuple[int, ...] = ()
    whole: bool = False
    """The stream ended with its [DONE]."""
    num_bytes: int = 0


def head_of(visitor: Visitor, number: int) -> bytes:
    body = {
        "model": visitor.model,
        "prompt": visitor.prompt,
        "max_tokens": visitor.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    if visitor.kind == "slow":
        body["logprobs"] = SLOW_LOGPROBS
    raw = json.dumps(body).encode()
    # A long id is in every event: the answers are large beside the buffers.
    name = f"{number:-<120}"
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"X-Request-Id: {name}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    ).encode() + raw


async def visit(host: str, port: int, visitor: Visitor, number: int) -> Seen:
    """One request over one connection."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        if visitor.kind in ("slow", "stuck"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        await loop.sock_connect(sock, (host, port))
        await loop.sock_sendall(sock, head_of(visitor, number))
        if visitor.kind == "stuck":
            return await _until_hung_up(sock)
        data = bytearray()
        while True:
            limit = SLOW_READ_BYTES if visitor.kind == "slow" else READ_BYTES
            piece = await loop.sock_recv(sock, limit)
            data += piece
            if not piece or (visitor.kind == "leaver" and len(data) > visitor.leave_after):
                return parse(bytes(data))
            if visitor.kind == "slow":
                await asyncio.sleep(SLOW_PAUSE_S)


async def _until_hung_up(sock: socket.socket) -> Seen:
    """Waits for the reset without reading: a poll that asks for nothing hears only of errors."""
    import select

    poller = select.poll()
    poller.register(sock, 0)
    while not poller.poll(0):
        await asyncio.sleep(0.02)
    return Seen(status=0)


def parse(data: bytes) -> Seen:
    """A response whose body is chunked or ends with the connection."""
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1]) if head else 0
    if b"transfer-encoding: chunked" in head.lower():
        body = _unchunk(body)
    tokens: list[int] = []
    whole = False
    for line in body.split(b"\n"):
        if line == b"data: [DONE]":
            whole = True
        elif line.startswith(b"data: ") and line.endswith(b"}"):
            for choice in json.loads(line[6:]).get("choices", ()):
                tokens += choice["token_ids"]
    return Seen(status=status, tokens=tuple(tokens), whole=whole, num_bytes=len(data))


def _unchunk(body: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while True:
        end = body.find(b"\r\n", at)
        if end < 0:
            return b"".join(parts)
        size = int(body[at:end] or b"0", 16)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
        if size == 0:
            return b"".join(parts)


async def crowd(host: str, port: int, visitors: Sequence[Visitor]) -> list[Seen]:
    """All of them at once."""
    return list(
        await asyncio.gather(*(visit(host, port, who, i) for i, who in enumerate(visitors)))
    )


def run_crowd(url: str, visitors: Sequence[Visitor], *, timeout_s: float = 600.0) -> list[Seen]:
    """`crowd` in a process of its own."""
    host, port = url.removeprefix("http://").split(":")
    paths = [str(TESTS.parent / "src"), str(TESTS)]
    done = subprocess.run(
        [sys.executable, "-m", "support.crowd", host, port],
        input=msgspec.json.encode(visitors),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        timeout=timeout_s,
        check=True,
    )
    return msgspec.json.decode(done.stdout, type=list[Seen])


def main() -> None:
    visitors = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Visitor])
    seen = asyncio.run(crowd(sys.argv[1], int(sys.argv[2]), visitors))
    sys.stdout.buffer.write(msgspec.json.encode(seen))


if __name__ == "__main__":
    main()

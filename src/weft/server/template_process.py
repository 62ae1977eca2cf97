"""The process in which chat templates run: `python -m weft.server.template_process`.

A template can loop for ever or ask for gigabytes in ways that no check inside the interpreter
sees: a loop over a loop calls nothing, `x ~ x` doubles, one `replace` of a long text is one
instruction. A thread cannot be stopped, a process can. So this one has an address space of
MEMORY_BYTES, an alarm for every job, no environment and nothing open but two pipes.

Frames on stdin and stdout: 4 bytes of length (little-endian), then msgpack. One `Job` in, one
`Rendered` out; an empty frame says that it has started. Ends when stdin does.
"""

import resource
import signal
import sys
from typing import Any, BinaryIO

import msgspec

from weft.core.errors import WeftError
from weft.server.templates import ChatTemplate, TemplateFailure

MEMORY_BYTES = 768 << 20
MAX_FRAME_BYTES = 256 << 20
MAX_COMPILED = 64
ALARM_AFTER_S = 2.0
"""Past the deadline, should the parent be gone and nobody else end it."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    tokens: dict[str, str]
    max_chars: int
    limit_s: float
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    documents: list[dict[str, Any]]
    args: dict[str, Any]
    add_generation_prompt: bool


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    text: str | None = None
    failure: str | None = None
    """Why there is none, for the client."""


def read_frame(stream: BinaryIO) -> bytes | None:
    """None at the end."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    size = int.from_bytes(head, "little")
    body = stream.read(size) if size <= MAX_FRAME_BYTES else b""
    return body if len(body) == size else None


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


class _Renderer:
    def __init__(self) -> None:
        self._compiled: dict[str, ChatTemplate] = {}

    def render(self, job: Job) -> Rendered:
        try:
            text = self._template(job).render(
                job.messages,
                tools=job.tools,
                documents=job.documents,
                args=job.args,
                add_generation_prompt=job.add_generation_prompt,
            )
        except (TemplateFailure, WeftError) as error:
            return Rendered(failure=str(error))
        except MemoryError:
            return Rendered(failure="the chat template needs too much memory")
        return Rendered(text=text)

    def _template(self, job: Job) -> ChatTemplate:
        key = f"{job.max_chars} {job.limit_s} {sorted(job.tokens.items())} {job.source}"
        if key not in self._compiled:
            if len(self._compiled) >= MAX_COMPILED:
                self._compiled.clear()
            self._compiled[key] = ChatTemplate(
                job.source, tokens=job.tokens, max_chars=job.max_chars, limit_s=job.limit_s
            )
        return self._compiled[key]


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for sig in (signal.SIGINT, signal.SIGTERM):  # the parent ends it, when it has no more jobs
        signal.signal(sig, signal.SIG_IGN)
    decoder = msgspec.msgpack.Decoder(Job)
    renderer = _Renderer()
    sys.stdout.buffer.write(frame(b""))
    sys.stdout.buffer.flush()
    while (body := read_frame(sys.stdin.buffer)) is not None:
        job = decoder.decode(body)
        signal.setitimer(signal.ITIMER_REAL, job.limit_s + ALARM_AFTER_S)
        rendered = msgspec.msgpack.encode(renderer.render(job))
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(frame(rendered))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

"""Chat templates of checkpoints, rendered in processes that can be killed.

`RenderProcesses` keeps a few of them (see `template_process`); a job that is not done by its
deadline ends with its process, and the next job gets a fresh one.
"""

import atexit
import functools
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

import weft
from weft.server.template_process import MAX_FRAME_BYTES, Job, Rendered, frame
from weft.server.templates import TemplateFailure, check_template

MAX_PROCESSES = 4
START_LIMIT_S = 60.0
GRACE_S = 0.5
"""The process itself notices most deadlines and says so; after this much more it is killed."""
_READ_BYTES = 1 << 16
_KEPT_ENVIRONMENT = ("PATH", "TZ", "LANG", "LC_ALL", "LC_TIME")


class _Stuck(Exception):
    """The process said nothing in time, or died."""


class _Process:
    """One child; used by one thread at a time."""

    def __init__(self) -> None:
        root = str(Path(weft.__file__).parents[1])
        environment = {k: v for k, v in os.environ.items() if k in _KEPT_ENVIRONMENT}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "weft.server.template_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "PYTHONPATH": root},
            bufsize=0,
        )
        try:
            self._read(time.monotonic() + START_LIMIT_S)
        except _Stuck:
            self.kill()
            raise

    @property
    def is_dead(self) -> bool:
        return self._child.poll() is not None

    def render(self, job: bytes, limit_s: float) -> Rendered:
        """Raises _Stuck; the process has then to be killed."""
        deadline_s = time.monotonic() + limit_s + GRACE_S
        data = memoryview(frame(job))
        assert self._child.stdin is not None
        try:
            while data:  # an idle child reads all of it
                data = data[self._child.stdin.write(data) :]
        except OSError:
            raise _Stuck from None
        try:
            return msgspec.msgpack.decode(self._read(deadline_s), type=Rendered)
        except msgspec.DecodeError:
            raise _Stuck from None

    def _read(self, deadline_s: float) -> bytes:
        """One frame. Raises _Stuck."""
        assert self._child.stdout is not None
        arrival = select.poll()
        arrival.register(self._child.stdout, select.POLLIN)
        buffer = bytearray()
        while len(buffer) < 4 or len(buffer) < 4 + int.from_bytes(buffer[:4], "little"):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not arrival.poll(left_s * 1e3):
                raise _Stuck
            data = os.read(self._child.stdout.fileno(), _READ_BYTES)
            buffer += data
            if not data or len(buffer) > MAX_FRAME_BYTES:
                raise _Stuck
        return bytes(buffer[4:])

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()


class RenderProcesses:
    """At most `limit` of them, started when needed. Thread-safe."""

    def __init__(self, limit: int = MAX_PROCESSES) -> None:
        self._free = threading.Semaphore(limit)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []

    def render(self, job: Job) -> str:
        """Raises TemplateFailure."""
        try:
            data = msgspec.msgpack.encode(job)
        except OverflowError:
            raise TemplateFailure(
                "the chat template can only be given whole numbers of at most 64 bits"
            ) from None
        with self._free:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is not None and process.is_dead:  # nobody's fault: killed while it waited
                process.kill()
                process = None
            try:
                process = process or _Process()
            except (OSError, _Stuck):
                raise TemplateFailure("no process for chat templates can be started") from None
            try:
                rendered = process.render(data, job.limit_s)
            except _Stuck:
                process.kill()
                raise TemplateFailure(
                    "the chat template took too long or too much memory and was stopped"
                ) from None
            except BaseException:
                process.kill()
                raise
            with self._lock:
                self._idle.append(process)
        if rendered.text is None:
            raise TemplateFailure(rendered.failure or "the chat template failed")
        return rendered.text

    def close(self) -> None:
        """End those that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.kill()


@functools.cache
def shared_processes() -> RenderProcesses:
    """Those of this Python process; they end with it."""
    processes = RenderProcesses()
    atexit.register(processes.close)
    return processes


class CheckpointTemplate:
    """A template that came with a checkpoint: `ChatTemplate`, in another process."""

    def __init__(
        self,
        source: str,
        *,
        tokens: Mapping[str, str],
        max_chars: int,
        limit_s: float,
        processes: RenderProcesses | None = None,
    ) -> None:
        """Raises WeftError when `source` is no template."""
        check_template(source)
        self._source = source
        self._tokens = dict(tokens)
        self._max_chars = max_chars
        self._limit_s = limit_s
        self._processes = processes or shared_processes()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        args: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """See `ChatTemplate.render`. Raises TemplateFailure."""
        job = Job(
            source=self._source,
            tokens=self._tokens,
            max_chars=self._max_chars,
            limit_s=self._limit_s,
            messages=[dict(message) for message in messages],
            tools=[dict(tool) for tool in tools],
            documents=[dict(document) for document in documents],
            args=dict(args or {}),
            add_generation_prompt=add_generation_prompt,
        )
        return self._processes.render(job)

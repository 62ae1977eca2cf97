"""Messages over a private Unix stream socket: a 4-byte little-endian length, then msgpack.

Two ends: `WorkerChannel` is plain and synchronous, `HubChannel` lives in an event loop. A worker's
`send` returns when the kernel has the bytes, so whatever a worker did after it, even being killed,
the hub hears the message first. For the hub to keep that promise it reads until the end of the
stream also when its own writes fail; asyncio's transports drop unread data then, hence our own.
"""

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from weft.transport.messages import HubMessage, WorkerMessage

MAX_FRAME_BYTES = 64 << 20
END_OF_STREAM = "end of stream"
_HEADER_BYTES = 4
_READ_BYTES = 1 << 18
_READS_PER_TURN = 16

M = TypeVar("M")


class ChannelClosed(Exception):
    """The other end is gone."""


class BadFrame(Exception):
    """The other end does not speak our language. `before`: the messages that came whole before."""

    def __init__(self, reason: str, before: Sequence[Any] = ()) -> None:
        super().__init__(reason)
        self.before = before


def encode_frame(message: HubMessage | WorkerMessage) -> bytearray:
    """Raises ValueError if the message is larger than a frame may be."""
    frame = bytearray(_HEADER_BYTES)
    _ENCODER.encode_into(message, frame, _HEADER_BYTES)
    size = len(frame) - _HEADER_BYTES
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {size} bytes is larger than a frame may be")
    frame[:_HEADER_BYTES] = size.to_bytes(_HEADER_BYTES, "little")
    return frame


_ENCODER = msgspec.msgpack.Encoder()


class FrameReader(Generic[M]):
    """Bytes in, whole messages out. Holds at most one partial frame."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[M]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[M]:
        """Raises BadFrame on a length out of bounds or a body that is no message."""
        buffer = self._buffer
        buffer += data
        messages: list[M] = []
        start = 0
        with memoryview(buffer) as view:
            while len(buffer) - start >= _HEADER_BYTES:
                size = int.from_bytes(view[start : start + _HEADER_BYTES], "little")
                if size > MAX_FRAME_BYTES:
                    raise BadFrame(f"a frame of {size} bytes", messages)
                end = start + _HEADER_BYTES + size
                if len(buffer) < end:
                    break
                try:
                    messages.append(self._decoder.decode(view[start + _HEADER_BYTES : end]))
                except (msgspec.DecodeError, ValueError) as error:
                    raise BadFrame(str(error), messages) from None
                start = end
        del buffer[:start]
        return messages


class WorkerChannel:
    """The worker's end. Not thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = FrameReader(msgspec.msgpack.Decoder(HubMessage))
        # Not select.select: a busy server passes on a descriptor of any number, also above 1023.
        self._arrival = select.poll()
        self._arrival.register(sock, select.POLLIN)
        sock.setblocking(True)

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: WorkerMessage) -> None:
        """Returns when the kernel has the bytes. Raises ChannelClosed."""
        try:
            self._sock.sendall(encode_frame(message))
        except OSError as error:
            raise ChannelClosed(str(error)) from None

    def receive(self, timeout_s: float | None = 0.0) -> list[HubMessage]:
        """What has arrived; empty if nothing has within the timeout (None: wait). Raises
        ChannelClosed once the hub is gone and everything it sent was returned."""
        messages: list[HubMessage] = []
        while not messages:
            if not self._arrival.poll(None if timeout_s is None else timeout_s * 1e3):
                break
            messages = self._read()
        return messages

    def _read(self) -> list[HubMessage]:
        try:
            data = self._sock.recv(_READ_BYTES)
        except OSError as error:
            raise ChannelClosed(str(error)) from None
        if not data:
            raise ChannelClosed(END_OF_STREAM)
        return self._reader.feed(data)

    def close(self) -> None:
        self._sock.close()


class HubChannel:
    """The hub's end, in the running event loop. Never blocks: what the kernel does not take at
    once is kept and written later.

    `on_messages` gets everything that arrived together; `on_end` comes once, after the last of
    them, with the reason.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_messages: Callable[[list[WorkerMessage]], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(msgspec.msgpack.Decoder(WorkerMessage))
        self._on_messages = on_messages
        self._on_end = on_end
        self._pending = bytearray()
        self._writable = True
        self._open = True
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def send(self, message: HubMessage) -> None:
        """To a worker that is gone: does nothing; `on_end` tells."""
        if not (self._open and self._writable):
            return
        self._pending += encode_frame(message)
        if len(self._pending) and not self._flush():
            self._loop.add_writer(self._sock, self._on_writable)

    def _flush(self) -> bool:
        """Write what the kernel takes. True if nothing is left to write."""
        try:
            while self._pending:
                sent = self._sock.send(self._pending)
                del self._pending[:sent]
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:  # the worker is gone; what it said before is still to be read
            self._writable = False
            self._pending.clear()
        return True

    def _on_writable(self) -> None:
        if self._flush():
            self._loop.remove_writer(self._sock)

    def finish(self) -> None:
        """The worker process is gone: hear all that it left, then close. `on_end` came already,
        or comes in this call."""
        while self._open and self._readable():
            pass
        if self._open:
            self._end(END_OF_STREAM)

    def _readable(self) -> bool:
        """Hear what is there, within bounds. False if there was nothing."""
        messages: list[WorkerMessage] = []
        end: str | None = None
        heard = False
        for _ in range(_READS_PER_TURN):
            try:
                data = self._sock.recv(_READ_BYTES)
                if not data:
                    end = END_OF_STREAM
                    break
                heard = True
                messages += self._reader.feed(data)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:  # a reset: it ended with messages of ours unread
                end = END_OF_STREAM
                break
            except BadFrame as error:
                messages += error.before
                end = str(error)
                break
        if messages:
            self._on_messages(messages)
        if end is not None and self._open:
            self._end(end)
        return heard

    def _end(self, reason: str) -> None:
        self.close()
        self._on_end(reason)

    def close(self) -> None:
        """Idempotent. No callback comes afterwards."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._sock)
            with contextlib.suppress(ValueError, OSError):
                self._loop.remove_writer(self._sock)
            self._sock.close()

"""Frames, and who hears what when the other end dies."""

import asyncio
import fcntl
import itertools
import resource
import socket
import subprocess
import sys
import threading

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.core.actions import Emit, KvGone, KvParked, WakeAt
from weft.core.events import Cancel, Submit
from weft.core.ids import ModelName, RequestId
from weft.core.request import Extent, ParkedKv, Request, Sampling
from weft.transport.channel import (
    MAX_FRAME_BYTES,
    BadFrame,
    ChannelClosed,
    FrameReader,
    HubChannel,
    WorkerChannel,
    encode_frame,
)
from weft.transport.messages import (
    HubMessage,
    Shutdown,
    StepRequests,
    UnitEvents,
    UnitNotices,
    WorkerMessage,
)

KV = ParkedKv(extents=(Extent(4096, 8192), Extent(0, 4096)), tokens=33)


def request(i: int, prompt_tokens: int = 3) -> Request:
    return Request(
        id=RequestId(i),
        model=ModelName("m"),
        prompt=tuple(range(prompt_tokens)),
        max_tokens=5,
        sampling=Sampling(temperature=0.5, seed=2**63 - 1),
        hold_deadline_ns=10**18,
    )


def notices(i: int) -> UnitNotices:
    return UnitNotices(
        incarnation=i,
        notices=(
            KvParked(request=RequestId(i), kv=KV),
            KvGone(request=RequestId(i)),
            Emit(request=RequestId(i), tokens=(1, 2), finish="stop"),
            WakeAt(at_ns=7),
        ),
    )


def events(i: int) -> UnitEvents:
    return UnitEvents(
        incarnation=i,
        events=(
            Submit(request=request(i), emitted=(4,), resume=KV),
            Cancel(request=RequestId(i)),
        ),
    )


@given(cuts=st.lists(st.integers(0, 2000), max_size=12))
def test_any_cut_of_the_bytes_gives_the_same_messages(cuts: list[int]) -> None:
    messages: list[HubMessage] = [events(1), Shutdown(), events(2)]
    data = b"".join(encode_frame(m) for m in messages)
    reader: FrameReader[HubMessage] = FrameReader(msgspec.msgpack.Decoder(HubMessage))
    places = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    got: list[HubMessage] = []
    for begin, end in itertools.pairwise(places):
        got += reader.feed(data[begin:end])
    assert got == messages


@pytest.mark.parametrize(
    "data",
    [
        (MAX_FRAME_BYTES + 1).to_bytes(4, "little"),
        (2).to_bytes(4, "little") + b"\xc1\xc1",
        encode_frame(notices(1)),  # a worker's message where a hub's is expected
    ],
    ids=["too long", "not msgpack", "not for us"],
)
def test_what_is_not_a_message_is_refused(data: bytes) -> None:
    reader: FrameReader[HubMessage] = FrameReader(msgspec.msgpack.Decoder(HubMessage))
    with pytest.raises(BadFrame):
        reader.feed(data)


class Ear:
    """Collects what a HubChannel hears."""

    def __init__(self) -> None:
        self.messages: list[WorkerMessage] = []
        self.end: str | None = None
        self.changed = asyncio.Event()

    def on_messages(self, messages: list[WorkerMessage]) -> None:
        assert self.end is None
        self.messages += messages
        self.changed.set()

    def on_end(self, reason: str) -> None:
        assert self.end is None
        self.end = reason
        self.changed.set()

    async def until(self, count: int | None) -> None:
        """`count` messages, or the end of the stream."""
        while (self.end is None) if count is None else (len(self.messages) < count):
            self.changed.clear()
            await self.changed.wait()


def test_both_directions() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        ear = Ear()
        hub, worker = HubChannel(ours, ear.on_messages, ear.on_end), WorkerChannel(theirs)
        assert worker.receive() == []
        hub.send(events(1))
        hub.send(Shutdown())
        assert worker.receive(None) == [events(1), Shutdown()]
        worker.send(notices(1))
        worker.send(StepRequests(incarnation=1, requests=(RequestId(4),)))
        await ear.until(2)
        assert ear.messages[0] == notices(1)
        hub.close()
        with pytest.raises(ChannelClosed):
            worker.receive(None)
        with pytest.raises(ChannelClosed):
            worker.send(notices(2))
        worker.close()
        assert ear.end is None

    asyncio.run(scenario())


def test_a_large_instant_is_written_while_the_worker_reads_slowly() -> None:
    big = UnitEvents(
        incarnation=1,
        events=tuple(Submit(request=request(i, prompt_tokens=50_000)) for i in range(8)),
    )

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        ear = Ear()
        hub, worker = HubChannel(ours, ear.on_messages, ear.on_end), WorkerChannel(theirs)
        for _ in range(4):
            hub.send(big)
        got: list[HubMessage] = []
        while len(got) < 4:
            got += worker.receive()
            await asyncio.sleep(0)
        assert got == [big] * 4
        hub.close()
        worker.close()

    asyncio.run(scenario())


def test_everything_sent_before_death_is_heard_even_when_our_writes_fail() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        ear = Ear()
        hub, worker = HubChannel(ours, ear.on_messages, ear.on_end), WorkerChannel(theirs)
        hub.send(events(1))  # stays unread: the kernel reports a reset instead of an end
        for i in range(100):
            worker.send(notices(i))
        worker.close()
        hub.send(events(2))
        hub.send(events(3))
        await ear.until(None)
        assert ear.messages == [notices(i) for i in range(100)]
        hub.send(events(4))

    asyncio.run(scenario())


KILLED = """
import os, signal, socket, sys
from weft.core.actions import KvGone
from weft.transport.channel import WorkerChannel
from weft.transport.messages import UnitNotices
channel = WorkerChannel(socket.socket(fileno=int(sys.argv[1])))
for i in range(50):
    channel.send(UnitNotices(incarnation=i, notices=(KvGone(request=i),)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_sent_before_kill_9_is_heard() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        ear = Ear()
        hub = HubChannel(ours, ear.on_messages, ear.on_end)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", KILLED, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        await ear.until(None)
        assert process.wait() == -9
        heard = [m.incarnation for m in ear.messages if isinstance(m, UnitNotices)]
        assert heard == list(range(50))
        hub.close()

    asyncio.run(scenario())


def test_a_half_frame_at_the_end_is_dropped() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        ear = Ear()
        hub = HubChannel(ours, ear.on_messages, ear.on_end)
        frame = encode_frame(notices(1))
        thread = threading.Thread(target=lambda: theirs.sendall(frame + frame[:-1]))
        thread.start()
        thread.join()
        theirs.close()
        await ear.until(None)
        assert ear.messages == [notices(1)]
        hub.close()

    asyncio.run(scenario())


def test_a_message_larger_than_a_frame_is_refused_by_its_sender() -> None:
    huge = StepRequests(incarnation=1, requests=(RequestId(2**40),) * (MAX_FRAME_BYTES // 9 + 10))
    with pytest.raises(ValueError, match="larger than a frame"):
        encode_frame(huge)


def test_a_worker_hears_on_a_descriptor_above_1023() -> None:
    """A server with a thousand open streams hands such a one to the worker it restarts."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 1100:
        pytest.skip("no descriptor above 1023 can be had here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 1100), before[1]))
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            high = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 1024)
            channel = WorkerChannel(socket.socket(fileno=high))
            assert channel.receive(0.0) == []
            ours.sendall(encode_frame(Shutdown()))
            assert channel.receive(None) == [Shutdown()]
            channel.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_was_said_before_nonsense_is_heard() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        ear = Ear()
        hub = HubChannel(ours, ear.on_messages, ear.on_end)
        with theirs:
            theirs.sendall(encode_frame(notices(1)) + b"\xff\xff\xff\xff")
            await ear.until(None)
        assert ear.messages == [notices(1)] and ear.end == "a frame of 4294967295 bytes"
        hub.close()

    asyncio.run(scenario())

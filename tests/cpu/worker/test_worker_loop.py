"""The worker's loop: what is told before what is done, and what is an instant."""

import contextlib
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.pool_cases import request, spec, status
from weft.core.actions import (
    CopyKv,
    Drop,
    Emit,
    Interrupt,
    KvGone,
    Load,
    Row,
    Run,
    Status,
    StepPlan,
    UnitAction,
    UnitNotice,
    WakeAt,
)
from weft.core.events import (
    Assign,
    BindFailed,
    CopyDone,
    Done,
    Failed,
    ReportStatus,
    StepDone,
    Submit,
    Unassign,
    UnitEvent,
    Woke,
)
from weft.core.ids import ActionId, GranuleId, ModelName, RequestId, SlotId
from weft.core.model import AdapterShape, Architecture, ModelSpec
from weft.core.request import Extent, Sampling
from weft.engine.base import ImageRef
from weft.transport.channel import ChannelClosed, FrameReader, WorkerChannel, encode_frame
from weft.transport.messages import (
    BindModel,
    HubMessage,
    Shutdown,
    StepRequests,
    Unbound,
    UnitEvents,
    UnitNotices,
    WorkerMessage,
)
from weft.worker.loop import HEARTBEAT_NS, REPORT_EVERY_NS, Worker
from weft.worker.trace import Recorder

ARCH = msgspec.convert(
    {
        "family": "llama",
        "num_layers": 1,
        "hidden_size": 2,
        "intermediate_size": 2,
        "num_q_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 2,
        "vocab_size": 9,
        "max_position": 9,
        "norm_eps": 1e-5,
        "rope": {},
        "qkv_bias": False,
        "tied_embeddings": True,
        "dtype": "float32",
    },
    Architecture,
)


class World:
    """A worker between a hub's socket and an executor that notes what it gets and when."""

    def __init__(self, *, check: bool = False, recorder: Recorder | None = None) -> None:
        self.ours, theirs = socket.socketpair()
        self.wake, self.wake_out = socket.socketpair()
        self.ours.setblocking(False)
        self.channel = WorkerChannel(theirs)
        self.reader: FrameReader[WorkerMessage] = FrameReader(
            msgspec.msgpack.Decoder(WorkerMessage)
        )
        self.now_ns = 0
        self.story: list[Any] = []
        """Messages and submissions in the order in which they happened."""
        self.instants: list[list[UnitEvent]] = []
        self.answers: list[list[UnitAction | UnitNotice]] = []
        self.ends: list[UnitEvent] = []
        self.on_handle: Callable[[], None] | None = None
        self.known: dict[str, tuple[int, ...]] = {"m/kv": (1,)}
        self.unbindable = False
        self.progressed = 0
        self.is_idle = False
        self.worker = Worker(
            1,
            self.channel,
            self,
            self,
            check=check,
            recorder=recorder,
            forget_parked=self.forget_parked,
            clock=lambda: self.now_ns,
        )

    # the scheduler

    def handle(self, events: Sequence[UnitEvent], now_ns: int) -> Sequence[UnitAction | UnitNotice]:
        self.instants.append(list(events))
        return self.answers.pop(0) if self.answers else []

    def check_integrity(self) -> None:
        self.story.append("scheduler checked")

    @property
    def idle(self) -> bool:
        return self.is_idle

    def unused_host(self) -> tuple[Extent, ...]:
        return (Extent(8192, 4096),)

    def forget_parked(self, extents: Sequence[Extent]) -> None:
        assert extents == self.unused_host()
        self.story.append("parked memory forgotten")

    def mapped(self) -> dict[str, tuple[int, ...]]:
        return self.known

    # the executor (check_integrity serves both)

    def bind(
        self,
        model: ModelSpec,
        arch: Architecture,
        image: ImageRef,
        adapter: AdapterShape | None = None,
    ) -> None:
        self.hear()
        if self.unbindable:
            raise RuntimeError("no memory for its tables")
        self.story.append(f"bind {model.name}")

    def unbind(self, model: ModelName) -> None:
        self.story.append(f"unbind {model}")

    def submit(self, action: UnitAction) -> None:
        self.hear()
        self.story.append(action)

    def progress(self) -> int:
        return self.progressed

    def poll(self) -> Sequence[UnitEvent]:
        ends, self.ends = self.ends, []
        return ends

    def wait_fd(self) -> int:
        return self.wake.fileno()

    def close(self) -> None:
        for sock in (self.ours, self.wake, self.wake_out):
            sock.close()
        self.channel.close()

    # the hub

    def send(self, *messages: HubMessage) -> None:
        for message in messages:
            self.ours.sendall(encode_frame(message))

    def hear(self) -> None:
        """What is in the hub's socket at this moment goes into the story."""
        with contextlib.suppress(BlockingIOError):
            self.story += self.reader.feed(self.ours.recv(1 << 16))

    def turn(self, *answer: UnitAction | UnitNotice) -> list[UnitEvent]:
        """One round of the loop, in which the scheduler answers so. Returns the instant."""
        self.answers = [list(answer)]
        events = self.worker.gather()
        if events:
            self.worker.decide(events)
        self.hear()
        return events


class CheckedWorld(World):
    def check_integrity(self, *, mapped: dict[str, tuple[int, ...]] | None = None) -> None:
        self.story.append("scheduler" if mapped is None else mapped)


@pytest.fixture
def world() -> Any:
    world = World()
    yield world
    world.close()


def run(i: int, *requests: int) -> Run:
    rows = tuple(
        Row(
            request=RequestId(r),
            slot=SlotId(0),
            start=0,
            num_tokens=2,
            input=(1, 2),
            sample=Sampling(),
        )
        for r in requests
    )
    return Run(id=ActionId(i), plan=StepPlan(model=ModelName("m"), rows=rows))


def ended(i: int, *, last: bool = True) -> StepDone:
    return StepDone(action=ActionId(i), iterations=1, last=last, tokens=((5,),), device_ns=3)


def submit(i: int) -> UnitEvents:
    return UnitEvents(incarnation=1, events=(Submit(request=request(i)),))


GONE = KvGone(request=RequestId(1))


def test_notices_are_in_the_hubs_socket_before_the_actions_start(world: World) -> None:
    copy = CopyKv(
        id=ActionId(1),
        model=ModelName("m"),
        request=RequestId(2),
        pages=(),
        extents=(Extent(0, 4096),),
        tokens=1,
        to="host",
    )
    world.send(submit(2))
    world.turn(copy, GONE)
    assert world.story == [UnitNotices(incarnation=1, notices=(GONE,)), copy]


def test_suspects_are_named_before_their_step_and_only_when_new(world: World) -> None:
    world.send(submit(1))
    world.turn(run(1, 1, 2))
    world.ends = [ended(1)]
    world.turn(run(2, 1, 2), Emit(request=RequestId(1), tokens=(5,)))
    world.ends = [ended(2)]
    world.turn(run(3, 3))
    named = [m.requests if isinstance(m, StepRequests) else type(m).__name__ for m in world.story]
    assert named == [(1, 2), "Run", "UnitNotices", "Run", (3,), "Run"]


def test_steps_in_flight_together_are_named_together(world: World) -> None:
    world.send(submit(1))
    world.turn(run(1, 1))
    world.ends = [ended(1, last=False)]
    world.turn(run(2, 2))
    assert [m.requests for m in world.story if isinstance(m, StepRequests)] == [(1,), (1, 2)]


def test_everything_that_happened_is_one_instant(world: World) -> None:
    world.send(submit(1), submit(2))
    world.turn(run(1, 1), WakeAt(at_ns=50))
    world.send(submit(3))
    world.ends = [ended(1)]
    world.now_ns = 50
    events = world.turn()
    assert [type(e) for e in events] == [Submit, StepDone, Woke]


def test_an_instant_in_several_messages_is_handled_whole(world: World) -> None:
    first = UnitEvents(incarnation=1, events=(Submit(request=request(1)),), more=True)
    world.send(first)
    world.send(first, submit(2))
    events = world.turn()
    assert [e.request.id for e in events if isinstance(e, Submit)] == [1, 1, 2]


BIND = UnitEvents(
    incarnation=1,
    bind=(BindModel(model=spec(), arch=ARCH, image=ImageRef(key="k", offset=0, num_bytes=1)),),
    events=(Assign(model=spec()),),
)
UNASSIGN = UnitEvents(incarnation=1, events=(Unassign(model=ModelName("m")),))


def test_models_are_bound_once_and_before_their_events(world: World) -> None:
    load = Load(id=ActionId(1), model=ModelName("m"), granules=(GranuleId(0),))
    world.send(BIND)
    world.turn(load)
    world.send(BIND)
    world.turn()
    assert world.story == ["bind m", load]


def test_a_model_that_cannot_be_bound_does_not_end_the_worker(world: World) -> None:
    """A worker that died of it would die again at every restart, and all models with it."""
    world.unbindable = True
    world.send(BIND)
    failed = BindFailed(model=ModelName("m"), reason="no memory for its tables")
    instant = world.turn()
    assert isinstance(instant[0], Assign) and instant[1:] == [failed], "told in the same instant"
    world.unbindable = False
    world.send(BIND)
    world.turn()
    assert world.story == ["bind m"]


def test_a_model_is_unbound_when_the_scheduler_has_forgotten_it(world: World) -> None:
    world.send(BIND)
    world.turn()
    world.send(UNASSIGN)
    world.turn()
    assert world.story == ["bind m"], "a request of it is still running"
    world.known = {}
    world.ends = [Done(action=ActionId(9))]
    world.worker._in_flight[ActionId(9)] = Drop(id=ActionId(9), model=ModelName("m"), granules=())
    world.turn()
    world.send(BIND)
    world.turn()
    told = Unbound(incarnation=1, models=(ModelName("m"),))
    assert world.story == ["bind m", "unbind m", told, "bind m"], (
        "then its image may be overwritten"
    )


def test_what_never_could_be_bound_is_told_as_unbound_too(world: World) -> None:
    world.unbindable = True
    world.known = {}
    world.send(BIND)
    world.turn()
    world.send(UNASSIGN)
    world.turn()
    assert world.story == [Unbound(incarnation=1, models=(ModelName("m"),))]


def test_a_status_says_how_far_long_actions_are(world: World) -> None:
    world.progressed = 7
    world.send(submit(1))
    world.turn(Status(status=status(waiting=1)))
    assert world.story[-1].notices[0].status.progress == 7


def test_a_model_that_is_assigned_again_stays_bound(world: World) -> None:
    world.send(BIND, UNASSIGN, BIND)
    world.turn()
    world.known = {}
    world.send(submit(1))
    world.turn()
    assert world.story == ["bind m"]


def test_memory_of_parked_kv_goes_back_when_the_unit_is_idle(world: World) -> None:
    """Not before the first word of the hub, which may bring what an earlier incarnation parked;
    once, and again only after something was parked again."""
    forgotten = "parked memory forgotten"
    park = CopyKv(
        id=ActionId(5),
        model=ModelName("m"),
        request=RequestId(1),
        pages=(),
        extents=(Extent(0, 4096),),
        tokens=0,
        to="host",
    )
    world.is_idle = True
    world.ends = [Done(action=ActionId(9))]
    world.worker._in_flight[ActionId(9)] = Drop(id=ActionId(9), model=ModelName("m"), granules=())
    world.turn()
    assert forgotten not in world.story
    world.send(BIND)
    world.turn()
    world.send(UNASSIGN)
    world.turn()
    assert world.story.count(forgotten) == 1
    world.is_idle = False
    world.send(UNASSIGN)
    world.turn(park)
    assert world.story.count(forgotten) == 1
    world.is_idle = True
    world.send(UNASSIGN)
    world.turn()
    assert world.story.count(forgotten) == 2


def test_words_for_another_incarnation_are_a_fault(world: World) -> None:
    world.send(UnitEvents(incarnation=2))
    with pytest.raises(AssertionError, match="incarnation"):
        world.worker.gather()


def test_wake_at_is_replaced_and_fires_once(world: World) -> None:
    world.send(submit(1))
    world.turn(WakeAt(at_ns=10), WakeAt(at_ns=30))
    world.now_ns = 20
    assert world.turn() == []
    world.now_ns = 30
    assert world.turn() == [Woke()]
    assert world.turn() == []


def report(waiting: int = 0) -> Status:
    return Status(status=status(waiting=waiting))


def test_reports_come_when_things_happened_but_not_too_often(world: World) -> None:
    world.now_ns = REPORT_EVERY_NS
    world.send(submit(1))
    assert world.turn(report(1))[-1] == ReportStatus()
    world.send(submit(2))
    assert [type(e) for e in world.turn()] == [Submit]
    world.now_ns += REPORT_EVERY_NS - 1
    assert world.turn() == []
    world.now_ns += 1
    assert world.turn(report(1)) == [ReportStatus()]
    world.now_ns += HEARTBEAT_NS - 1
    assert world.turn() == []
    world.now_ns += 1
    assert world.turn(report(0)) == [ReportStatus()]
    world.now_ns += 10 * HEARTBEAT_NS
    assert world.turn() == []


def test_books_are_compared_when_idle() -> None:
    world = CheckedWorld(check=True)
    world.now_ns = REPORT_EVERY_NS
    world.send(submit(1))
    world.turn(report(1))
    assert world.story == [UnitNotices(incarnation=1, notices=(report(1),))]
    world.story.clear()
    world.now_ns += REPORT_EVERY_NS
    world.send(submit(1))
    world.turn(report(0), run(1, 1))
    assert "scheduler" not in world.story, "a step is in flight"
    world.ends = [ended(1)]
    world.turn()
    assert world.story[-2:] == ["scheduler", {"m/kv": (1,)}]
    world.close()


def test_the_loop_ends_on_shutdown_and_when_the_hub_is_gone(world: World) -> None:
    world.send(submit(1), Shutdown())
    world.worker.run()
    assert world.instants == []
    other = World()
    other.ours.close()
    with pytest.raises(ChannelClosed):
        other.worker.run()
    other.close()


def test_the_trace_has_every_action_and_the_plan_log_too(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, 1, "fake")
    world = World(recorder=recorder)
    load = Load(id=ActionId(1), model=ModelName("m"), granules=(GranuleId(0), GranuleId(1)))
    step = msgspec.structs.replace(run(2, 7), follow=ActionId(1))
    drop = Drop(id=ActionId(3), after=(ActionId(2),), model=ModelName("m"), granules=())
    stop = Interrupt(id=ActionId(4), target=ActionId(2))
    world.send(submit(1))
    world.now_ns = 5
    world.turn(load, step, drop, stop)
    world.now_ns = 9
    world.ends = [
        CopyDone(action=ActionId(1), num_bytes=123, device_ns=2),
        ended(2, last=False),
        ended(2),
        Failed(action=ActionId(3), cause="dependency"),
        Done(action=ActionId(4)),
    ]
    world.turn()
    recorder.close()
    world.close()
    lines = (tmp_path / "trace-unit0-1.jsonl").read_bytes().splitlines()
    header, *actions = [msgspec.json.decode(line) for line in lines]
    assert header["weft_trace"] == 1 and header["device"] == "fake"
    assert actions[0] == {
        "id": 1,
        "kind": "Load",
        "model": "m",
        "granules": 2,
        "after": [],
        "planned_ns": 5,
        "submitted_ns": 5,
        "done_ns": 9,
        "device_ns": 2,
        "bytes": 123,
        "ok": True,
    }
    assert [a["kind"] for a in actions] == ["Load", "Run", "Drop", "Interrupt"]
    one_step = actions[1]
    assert (one_step["iterations"], one_step["device_ns"], one_step["follow"]) == (2, 6, 1)
    assert (one_step["rows"], one_step["tokens"], one_step["requests"]) == (1, 2, [7])
    assert (actions[2]["ok"], actions[2]["cause"], actions[2]["after"]) == (
        False,
        "dependency",
        [2],
    )
    plan = (tmp_path / "plan-unit0-1.jsonl").read_bytes().splitlines()
    decoded = [msgspec.json.decode(line, type=UnitAction) for line in plan]
    assert decoded == [load, step, drop, stop]

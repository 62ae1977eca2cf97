"""The hub between clients and units, with a launcher that only takes notes."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest

from support.pool_cases import spec, status
from weft.core import errors
from weft.core.actions import Emit, KvGone, KvParked, Status, WakeAt
from weft.core.events import Assign, Cancel, Submit
from weft.core.ids import ModelName, RequestId
from weft.core.model import Architecture, RopeSpec
from weft.core.request import Extent, ParkedKv, Sampling, TokenLogprobs
from weft.core.unit import UnitSpec
from weft.engine.base import ImageRef
from weft.hub import hub as hub_module
from weft.hub.base import Chunk, HubRefusal, ModelCard, NewRequest
from weft.hub.hub import MAX_TOKENS_A_CHUNK, PoolHub
from weft.policy.dispatch.least_loaded import LeastLoaded
from weft.pool.scheduler import PoolScheduler
from weft.pool.units import Limits
from weft.transport.messages import BindModel, Hello, HubMessage, StepRequests, UnitNotices

ARCH = Architecture(
    family="llama",
    num_layers=1,
    hidden_size=2,
    intermediate_size=2,
    num_q_heads=1,
    num_kv_heads=1,
    head_dim=2,
    vocab_size=1000,
    max_position=512,
    norm_eps=1e-5,
    rope=RopeSpec(),
    qkv_bias=False,
    tied_embeddings=True,
    dtype="float32",
)
KV = ParkedKv(extents=(Extent(0, 4096),), tokens=3)


class Notes:
    """A launcher."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []
        self.stopped: list[tuple[int, int]] = []
        self.sent: list[HubMessage] = []

    def start(self, unit: int, incarnation: int) -> None:
        self.started.append((unit, incarnation))

    def stop(self, unit: int, incarnation: int) -> None:
        self.stopped.append((unit, incarnation))

    def send(self, unit: int, incarnation: int, message: HubMessage) -> None:
        self.sent.append(message)

    def host_usage(self) -> tuple[int, int]:
        return 100, 40


class Desk:
    """A hub with one model, one unit, and a clock that is set by hand."""

    def __init__(self, *, ready: bool = True, **limits: Any) -> None:
        self.now_ns = 0
        self.notes = Notes()
        scheduler = PoolScheduler(LeastLoaded(), Limits(**limits))
        self.hub = PoolHub(scheduler, self.notes, hold_s=120.0, clock=lambda: self.now_ns)
        card = ModelCard(
            name="m",
            path=".",
            created_s=0,
            max_context_tokens=512,
            vocab_size=1000,
            eos_ids=(),
            ttft_slo_s=1.0,
            tbt_slo_s=1.0,
        )
        image = ImageRef(key="k", offset=0, num_bytes=0)
        self.hub.add_model(card, BindModel(model=spec("m"), arch=ARCH, image=image))
        self.hub.add_unit(0)
        if ready:
            self.hub.model_ready("m")
            self.hello()

    def hello(self, incarnation: int = 1) -> None:
        unit = UnitSpec(granule_bytes=1, num_granules=1, host_bytes=0)
        self.hub.unit_messages(0, [Hello(incarnation=incarnation, device="d", spec=unit)])

    def open(self, **more: Any) -> tuple[RequestId, Any]:
        return self.hub.open(
            NewRequest(**{"model": "m", "prompt": (1, 2), "max_tokens": 5, **more})
        )

    def notices(self, *notices: Any, incarnation: int = 1) -> None:
        self.hub.unit_messages(0, [UnitNotices(incarnation=incarnation, notices=notices)])

    def emit(self, request: RequestId, *tokens: int, incarnation: int = 1, **more: Any) -> None:
        self.notices(Emit(request=request, tokens=tokens, **more), incarnation=incarnation)


def play(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def test_tokens_come_as_chunks_and_a_slow_client_gets_them_joined() -> None:
    async def scenario() -> None:
        desk = Desk()
        request, chunks = desk.open()
        desk.emit(request, 7)
        assert await anext(chunks) == Chunk(tokens=(7,))
        waiting = asyncio.create_task(anext(chunks))
        await asyncio.sleep(0)
        desk.emit(request, 8)
        assert await waiting == Chunk(tokens=(8,))
        for token in (9, 10):
            desk.emit(request, token)
        desk.emit(request, 11, finish="length")
        assert [chunk async for chunk in chunks] == [Chunk(tokens=(9, 10, 11), finish="length")]
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)

    play(scenario())


def test_what_a_slow_client_left_comes_in_chunks_of_bounded_size() -> None:
    async def scenario() -> None:
        desk = Desk()
        request, chunks = desk.open()
        for token in range(2 * MAX_TOKENS_A_CHUNK):
            desk.emit(request, token % 8)
        desk.emit(request, 3, finish="length")
        got = [chunk async for chunk in chunks]
        assert [len(chunk.tokens) for chunk in got] == [MAX_TOKENS_A_CHUNK] * 2 + [1]
        assert [chunk.finish for chunk in got] == [None, None, "length"]
        assert [t for chunk in got for t in chunk.tokens] == [
            *(i % 8 for i in range(2 * MAX_TOKENS_A_CHUNK)),
            3,
        ]

    play(scenario())


def test_log_probabilities_stay_with_their_tokens_and_the_prompt_comes_once() -> None:
    async def scenario() -> None:
        desk = Desk()
        request, chunks = desk.open(
            sampling=Sampling(logprobs=0), prompt_logprobs=0, max_tokens=400
        )
        (submitted,) = [e for m in desk.notes.sent for e in m.events if isinstance(e, Submit)]
        assert submitted.request.prompt_logprobs == 0
        scores = [TokenLogprobs(i, -float(i)) for i in range(MAX_TOKENS_A_CHUNK + 9)]
        prompt = (TokenLogprobs(2, -1.0),)
        for i, one in enumerate(scores):
            first = {"prompt_logprobs": prompt, "cached_tokens": 1} if i == 0 else {}
            desk.emit(request, i, logprobs=(one,), **first)
        desk.emit(request, finish="stop")
        got = [chunk async for chunk in chunks]
        assert [one for chunk in got for one in chunk.logprobs] == scores
        assert all([x.token for x in c.logprobs] == list(c.tokens) for c in got)
        assert [c.prompt_logprobs for c in got] == [prompt, ()]
        assert [c.cached_tokens for c in got] == [1, None]

    play(scenario())


def test_an_embedding_is_one_chunk() -> None:
    async def scenario() -> None:
        desk = Desk()
        request, chunks = desk.open(max_tokens=0, embed="mean")
        (submitted,) = [e for m in desk.notes.sent for e in m.events if isinstance(e, Submit)]
        assert submitted.request.embed == "mean"
        desk.emit(request, embedding=(b"abcd", b"efgh"), finish="stop")
        assert [c async for c in chunks] == [Chunk(embedding=(b"abcd", b"efgh"), finish="stop")]

    play(scenario())


def test_one_decision_is_one_message() -> None:
    async def scenario() -> None:
        desk = Desk(ready=False)
        desk.open()
        desk.open()
        desk.hub.model_ready("m")
        assert desk.notes.sent == [] and desk.notes.started == [(0, 1)]
        desk.hello()
        (message,) = desk.notes.sent
        assert [type(event) for event in message.events] == [Assign, Submit, Submit]
        assert [bind.model.name for bind in message.bind] == ["m"] and not message.more

    play(scenario())


def test_a_large_decision_is_cut_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "MAX_TOKENS_A_FRAME", 5)

    async def scenario() -> None:
        desk = Desk(ready=False)
        for _ in range(5):
            desk.open()
        desk.hub.model_ready("m")
        desk.hello()
        assert [(len(m.bind), len(m.events), m.more) for m in desk.notes.sent] == [
            (1, 3, True),
            (0, 2, True),
            (0, 1, False),
        ]

    play(scenario())


def test_refusals_are_raised_and_leave_nothing() -> None:
    async def scenario() -> None:
        desk = Desk(max_queue=1)
        desk.open()
        for more, code in (
            ({}, errors.QUEUE_FULL),
            ({"model": "n"}, errors.MODEL_NOT_FOUND),
            ({"prompt": (1,) * 600}, errors.CONTEXT_LENGTH),
        ):
            with pytest.raises(HubRefusal) as refusal:
                desk.open(**more)
            assert refusal.value.error.code == code
        assert desk.hub.view().unfinished == 1
        assert len(desk.notes.sent) == 2

    play(scenario())


def test_a_worker_that_dies_leaves_no_seam() -> None:
    async def scenario() -> None:
        desk = Desk()
        request, chunks = desk.open()
        desk.notices(
            Emit(request=request, tokens=(7,)), KvParked(request=request, kv=KV), WakeAt(at_ns=1)
        )
        desk.hub.unit_messages(0, [StepRequests(incarnation=1, requests=(request,))])
        desk.hub.unit_lost(0, 1, "killed by signal 9")
        assert desk.notes.started == [(0, 1), (0, 2)]
        assert not desk.hub.health().ready
        desk.emit(request, 99)
        desk.hello(incarnation=2)
        submit = desk.notes.sent[-1].events[-1]
        assert (submit.emitted, submit.resume, submit.request.reruns) == ((7,), KV, 1)
        desk.emit(request, 98)
        desk.emit(request, 8, incarnation=2, finish="stop")
        assert [chunk async for chunk in chunks] == [Chunk(tokens=(7, 8), finish="stop")]
        assert desk.hub.view().units[0].restarts == 1

    play(scenario())


def test_kv_that_is_gone_is_not_resumed() -> None:
    async def scenario() -> None:
        desk = Desk()
        request, _ = desk.open()
        desk.notices(KvParked(request=request, kv=KV), Emit(request=request, tokens=(1,)))
        desk.notices(KvGone(request=request))
        desk.hub.unit_lost(0, 1, "boom")
        desk.hello(incarnation=2)
        assert desk.notes.sent[-1].events[-1].resume is None

    play(scenario())


def test_cancel_reaches_the_unit_and_ends_the_stream() -> None:
    async def scenario() -> None:
        desk = Desk()
        request, chunks = desk.open()
        desk.hub.cancel(request)
        desk.hub.cancel(request)
        desk.hub.cancel(RequestId(999))
        assert [chunk.finish async for chunk in chunks] == ["cancelled"]
        assert desk.notes.sent[-1].events == (Cancel(request=request),)
        assert desk.hub.view().unfinished == 1
        desk.emit(request, finish="cancelled")
        await asyncio.wait_for(desk.hub.drained(), 1.0)

    play(scenario())


def test_a_model_that_fails_later_takes_its_requests_with_it() -> None:
    async def scenario() -> None:
        desk = Desk(ready=False)
        _, chunks = desk.open()
        desk.hub.model_failed("m", "shard is torn")
        (chunk,) = [chunk async for chunk in chunks]
        assert chunk.error is not None and chunk.error.message == "shard is torn"
        assert desk.hub.models()[0].failed == "shard is torn"
        desk.hello()
        assert desk.hub.health().ready, "nothing that could be served is missing"

    play(scenario())


def test_the_hold_deadline_wakes_the_hub() -> None:
    async def scenario() -> None:
        desk = Desk(ready=False)
        desk.hub._hold_ns = 1_000_000
        _, chunks = desk.open()
        desk.now_ns = 2_000_000
        (chunk,) = [chunk async for chunk in chunks]
        assert chunk.error is not None and chunk.error.code == errors.HOLD_DEADLINE
        desk.hub.close()

    play(scenario())


def test_health_is_progress_while_something_waits() -> None:
    second = 1_000_000_000

    async def scenario() -> None:
        desk = Desk()
        health = desk.hub.health
        desk.now_ns = 100 * second
        assert health().healthy and health().since_progress_s == 0.0
        request, _ = desk.open()
        assert health().healthy and health().waiting == 1
        desk.now_ns = 131 * second
        assert not health().healthy
        desk.notices(Status(status=status(actions_done=3, waiting=1)))
        assert health().healthy
        desk.now_ns = 162 * second
        desk.notices(Status(status=status(actions_done=3, waiting=1)))
        assert not health().healthy, "a report without news is no progress"
        desk.notices(Status(status=status(actions_done=3, bytes_copied=1, waiting=1)))
        assert health().healthy
        desk.now_ns = 193 * second
        far = msgspec.structs.replace(status(actions_done=3, bytes_copied=1), progress=1)
        desk.notices(Status(status=far))
        assert health().healthy, "a load that takes long is further than it was"
        desk.now_ns = 200 * second
        desk.hub.note_progress()
        assert health().healthy
        desk.now_ns = 260 * second
        assert not health().healthy
        desk.hello()
        assert health().healthy, "a worker that is up is progress: its start may take a minute"
        desk.now_ns = 300 * second
        assert not health().healthy
        desk.emit(request, 5)
        assert health().healthy
        desk.emit(request, 5, finish="length")
        desk.now_ns = 400 * second
        assert health().healthy and health().waiting == 0

    play(scenario())


def test_close_ends_what_is_open_and_drain_refuses_what_is_new() -> None:
    async def scenario() -> None:
        desk = Desk()
        _, chunks = desk.open()
        desk.hub.drain()
        with pytest.raises(HubRefusal):
            desk.open()
        desk.hub.close()
        (chunk,) = [chunk async for chunk in chunks]
        assert chunk.error is not None and chunk.error.code == errors.DRAINING

    play(scenario())


def test_the_view_shows_what_people_ask_for() -> None:
    async def scenario() -> None:
        desk = Desk()
        desk.notices(Status(status=status(actions_done=1)))
        view = desk.hub.view()
        assert (view.host_store_bytes, view.host_store_used_bytes) == (100, 40)
        (unit,) = view.units
        assert (unit.device, unit.incarnation, unit.up, unit.restarts) == ("d", 1, True, 0)
        assert unit.status is not None and unit.status.actions_done == 1
        assert [card.name for card in view.models] == [ModelName("m")]

    play(scenario())

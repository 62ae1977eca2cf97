"""Names: aliases, other weights under the same name, and what operators see of both."""

import asyncio
from typing import Any

import pytest

from support.pool_cases import model_status, spec, status
from weft.core.actions import Emit, Status
from weft.core.errors import MODEL_FAILED, MODEL_NOT_FOUND
from weft.core.events import Assign, Submit, Unassign, Unload, Warm
from weft.core.ids import ModelName, RequestId
from weft.core.model import Architecture, RopeSpec
from weft.core.unit import UnitSpec
from weft.engine.base import ImageRef
from weft.hub.base import HubRefusal, ModelCard, NewRequest
from weft.hub.hub import PoolHub
from weft.hub.models import numbered
from weft.policy.dispatch.least_loaded import LeastLoaded
from weft.pool.scheduler import PoolScheduler
from weft.pool.units import Limits
from weft.transport.messages import BindModel, Hello, HubMessage, Unbound, UnitEvents, UnitNotices

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


class Desk:
    """A hub with one unit that is up; `told` is what the unit was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.gone: list[str] = []
        self.hub = PoolHub(PoolScheduler(LeastLoaded(), Limits()), self, hold_s=100.0)
        self.hub.on_gone = self.gone.append
        self.hub.add_unit(0)
        unit = UnitSpec(granule_bytes=1, num_granules=1, host_bytes=0)
        self.hub.unit_messages(0, [Hello(incarnation=1, device="d", spec=unit)])

    def start(self, unit: int, incarnation: int) -> None: ...

    def stop(self, unit: int, incarnation: int) -> None: ...

    def send(self, unit: int, incarnation: int, message: HubMessage) -> None:
        assert isinstance(message, UnitEvents)
        self.told += message.events

    def host_usage(self) -> tuple[int, int]:
        return 0, 0

    def add(self, name: str, number: int = 1, *, ready: bool = True, **more: Any) -> ModelName:
        below = numbered(name, number)
        card = ModelCard(
            name=name,
            path=".",
            created_s=0,
            max_context_tokens=512,
            vocab_size=1000,
            eos_ids=(),
            ttft_slo_s=1.0,
            tbt_slo_s=1.0,
            **more,
        )
        image = ImageRef(key=below, offset=0, num_bytes=0)
        self.hub.add_model(card, BindModel(model=spec(below), arch=ARCH, image=image))
        if ready:
            self.hub.model_ready(below)
        return below

    def ask(self, model: str) -> RequestId:
        return self.hub.open(NewRequest(model=model, prompt=(1,), max_tokens=5))[0]

    def end(self, request: RequestId) -> None:
        emit = Emit(request=request, tokens=(), finish="length")
        self.hub.unit_messages(0, [UnitNotices(incarnation=1, notices=(emit,))])

    def forget(self, *models: str) -> None:
        names = tuple(ModelName(name) for name in models)
        self.hub.unit_messages(0, [Unbound(incarnation=1, models=names)])

    def submitted(self) -> list[str]:
        return [event.request.model for event in self.told if isinstance(event, Submit)]


@pytest.fixture
def desk() -> Any:
    """In an event loop: the hub sets timers."""
    made: list[Desk] = []

    def within(work: Any) -> None:
        async def scenario() -> None:
            made.append(Desk())
            work(made[0])

        asyncio.run(scenario())

    return within


def refusal(desk: Desk, model: str) -> str:
    with pytest.raises(HubRefusal) as refused:
        desk.ask(model)
    return refused.value.error.code


def test_aliases_are_names_in_requests(desk: Any) -> None:
    def work(desk: Desk) -> None:
        desk.add("a", aliases=("x", "y"))
        for name in ("a", "x", "y"):
            desk.ask(name)
        assert desk.submitted() == ["a", "a", "a"] and refusal(desk, "z") == MODEL_NOT_FOUND

    desk(work)


def test_new_weights_take_the_name_and_the_old_ones_finish(desk: Any) -> None:
    def work(desk: Desk) -> None:
        desk.add("a")
        old = desk.ask("a")
        desk.add("a", 2, ready=False, aliases=("x",))
        desk.ask("x")
        assert desk.submitted() == ["a"], "the new one waits for its image"
        assert not any(isinstance(event, Unassign) for event in desk.told)
        report = status(models=(model_status("a"), model_status("a#2")))
        desk.hub.unit_messages(0, [UnitNotices(incarnation=1, notices=(Status(status=report),))])
        shown = desk.hub.view().units[0].status
        assert shown is not None
        assert [model.name for model in shown.models] == ["a (old)", "a"]
        desk.hub.model_ready("a#2")
        assert desk.submitted() == ["a", "a#2"]
        desk.end(old)
        assert Unassign(model=ModelName("a")) in desk.told and not desk.gone
        desk.forget("a")
        assert desk.gone == ["a"]

    desk(work)


def test_a_removed_model_is_gone_after_its_last_request(desk: Any) -> None:
    def work(desk: Desk) -> None:
        desk.add("a")
        request = desk.ask("a")
        desk.hub.remove_model("a")
        assert refusal(desk, "a") == MODEL_NOT_FOUND and desk.hub.models() == ()
        desk.end(request)
        desk.hub.unit_lost(0, 1, "killed")
        assert desk.gone == ["a"], "a dead worker reads nothing"

    desk(work)


def test_a_failed_model_is_replaced_by_one_that_works(desk: Any) -> None:
    def work(desk: Desk) -> None:
        desk.add("a", ready=False)
        desk.hub.model_failed("a", "torn")
        assert refusal(desk, "a") == MODEL_FAILED
        desk.add("a", 2)
        desk.ask("a")
        assert desk.submitted() == ["a#2"] and desk.gone == ["a"]

    desk(work)


def test_wishes_reach_the_unit_when_the_model_is_there(desk: Any) -> None:
    def work(desk: Desk) -> None:
        desk.add("a", ready=False)
        desk.hub.warm("a")
        assert desk.told == []
        desk.hub.model_ready("a")
        assert [type(event) for event in desk.told] == [Assign, Warm]
        desk.hub.unload("a")
        assert desk.told[-1] == Unload(model=ModelName("a"))
        desk.hub.warm("nobody")

    desk(work)

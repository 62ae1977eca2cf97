"""Any sequence of reloads, while images are built, requests run and units forget in their own time:
what is served is what the last file says, and every image holds the bytes of its checkpoint."""

import asyncio
import gc
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tiny import tiny_checkpoint
from weft.config.pool_config import PoolConfig, make_pool_config
from weft.core.actions import Emit
from weft.core.events import Assign, Submit, Unassign
from weft.core.ids import ModelName, RequestId
from weft.core.unit import UnitSpec
from weft.hub.base import NewRequest
from weft.hub.hub import PoolHub
from weft.memory.host_store import HostStore
from weft.node.catalog import Catalog
from weft.node.images import build, plan_store
from weft.policy.dispatch.least_loaded import LeastLoaded
from weft.pool.scheduler import PoolScheduler
from weft.pool.units import Limits
from weft.transport.messages import BindModel, Hello, HubMessage, Unbound, UnitEvents, UnitNotices

MIB = 1 << 20
FOLDERS = ("ant", "bee", "cat", "nowhere")
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots")
    for seed, name in enumerate(FOLDERS[:-1]):
        tiny_checkpoint(folder / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def wanted(roots: Path) -> "Wanted":
    """The image of each checkpoint."""
    config = {"models": [{"name": n, "path": n} for n in FOLDERS[:-1]]}
    plan = plan_store(msgspec.convert(config, PoolConfig), roots, 64 * MIB)
    host = HostStore.create(plan.store_bytes)
    found = []
    for model in plan.models:
        view = np.frombuffer(host.view(model.image.offset, model.image.num_bytes), np.uint8)
        images = []
        for fill in (0, 255):
            view[:] = fill
            assert build(model, host, lambda _: None, 1) is None
            images.append(view.copy())
        found.append((images[0], images[0] == images[1]))
        del view
    host.close()
    return Wanted(found)


class Wanted:
    """Images as they should be: bytes, and which of them count (the others are gaps)."""

    def __init__(self, images: list[tuple[Any, Any]]) -> None:
        self._images = images

    def has(self, view: Any) -> bool:
        return any(
            len(image) == len(view) and bool(((image == view) | ~counts).all())
            for image, counts in self._images
        )


class House:
    """A catalog, its hub, and one unit that is played here."""

    def __init__(self, roots: Path, config: PoolConfig, rng: random.Random, room: int) -> None:
        self.rng = rng
        self.roots = roots
        self.assigned: dict[str, BindModel] = {}
        self.binds: dict[str, BindModel] = {}
        self.leaving: set[str] = set()
        self.running: dict[RequestId, str] = {}
        plan = plan_store(config, roots, room + 4 * MIB, spare_bytes=room)
        self.host = HostStore.create(plan.store_bytes)
        self.hub = PoolHub(PoolScheduler(LeastLoaded(), Limits()), self, hold_s=1000.0)
        self.catalog = Catalog(config, roots, plan, self.host, self.hub)
        self.hub.add_unit(0)
        unit = UnitSpec(granule_bytes=1, num_granules=1, host_bytes=0)
        pins = rng.random() < 0.5
        self.hub.unit_messages(0, [Hello(incarnation=1, device="d", spec=unit, pins_host=pins)])

    def start(self, unit: int, incarnation: int) -> None: ...

    def stop(self, unit: int, incarnation: int) -> None: ...

    def host_usage(self) -> tuple[int, int]:
        return 0, 0

    def send(self, unit: int, incarnation: int, message: HubMessage) -> None:
        assert isinstance(message, UnitEvents)
        self.binds |= {bind.model.name: bind for bind in message.bind}
        for event in message.events:
            match event:
                case Assign(model=model):
                    self.assigned[model.name] = self.binds[model.name]
                    self.leaving.discard(model.name)
                case Unassign(model=name):
                    del self.assigned[name]
                    self.leaving.add(name)
                case Submit(request=request):
                    assert request.model in self.assigned
                    self.running[request.id] = request.model

    def ask(self) -> None:
        card = self.rng.choice(self.hub.models() or [None])
        if card is not None and card.failed is None:
            self.hub.open(NewRequest(model=card.name, prompt=(1,), max_tokens=3))

    def finish_one(self) -> None:
        if self.running:
            request = self.rng.choice(list(self.running))
            del self.running[request]
            emit = Emit(request=request, tokens=(), finish="length")
            self.hub.unit_messages(0, [UnitNotices(incarnation=1, notices=(emit,))])

    def forget_one(self) -> None:
        if self.leaving:
            name = self.rng.choice(sorted(self.leaving))
            self.leaving.discard(name)
            self.hub.unit_messages(0, [Unbound(incarnation=1, models=(ModelName(name),))])

    def check(self, wanted: Wanted) -> None:
        """Whatever a unit may read holds what it should, and nobody else lies there."""
        for bind in self.assigned.values():
            image = bind.image
            view = np.frombuffer(self.host.view(image.offset, image.num_bytes), np.uint8)
            assert wanted.has(view), f"{bind.model.name}: its image was overwritten"


def random_config(rng: random.Random) -> PoolConfig:
    names = rng.sample(NAMES, rng.randint(1, len(NAMES)))
    models = [
        {
            "name": name,
            "path": rng.choice(FOLDERS),
            "pinned": rng.random() < 0.3,
            "max_context_tokens": rng.choice([None, 32]),
        }
        for name in names
    ]
    return make_pool_config({"models": models}, source="test")


async def play(rng: random.Random, roots: Path, wanted: Wanted) -> None:
    first = make_pool_config({"models": [{"name": "a", "path": "ant"}]}, source="test")
    house = House(roots, first, rng, rng.choice([4, 8, 24]) * MIB)
    building = asyncio.create_task(house.catalog.run_builds())
    config, failed = first, set()
    for _ in range(rng.randint(1, 12)):
        for _ in range(rng.randint(0, 4)):
            rng.choice([house.ask, house.ask, house.finish_one, house.forget_one])()
            house.check(wanted)
        if rng.random() < 0.3:
            await asyncio.sleep(0.002)
        config = random_config(rng)
        failed = set((await house.catalog.apply(config, roots)).failed)
        house.check(wanted)
    for _ in range(400):
        house.finish_one()
        house.forget_one()
        await asyncio.sleep(0)
        if not (house.running or house.leaving or len(house.catalog._jobs)):
            await asyncio.sleep(0.005)
            if house.catalog._building is None and not house.running and not house.leaving:
                break
    house.check(wanted)
    assert {card.name for card in house.hub.models()} == {model.name for model in config.models}
    # A last reload with all the room there is: what failed for want of room is served now.
    last = make_pool_config({"models": [{"name": "b", "path": "bee"}]}, source="test")
    report = await house.catalog.apply(last, roots)
    assert not report.failed or failed, report
    house.catalog.stop_building()
    await building
    house.hub.close()
    gc.collect()  # a stopped build leaves its view to the collector
    house.host.close()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 40))
def test_any_sequence_of_reloads(seed: int, roots: Path, wanted: Wanted) -> None:
    asyncio.run(play(random.Random(seed), roots, wanted))


def test_a_changed_template_is_a_change(roots: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("a")
    model = {"name": "a", "path": "ant", "chat_template": str(template)}
    config = make_pool_config({"models": [model]}, source="test")

    async def scenario() -> None:
        house = House(roots, config, random.Random(1), 4 * MIB)
        before = house.hub.models()
        assert not (await house.catalog.apply(config, roots)).updated
        os.utime(template, ns=(5, 5))
        assert (await house.catalog.apply(config, roots)).updated == ["a"]
        assert house.hub.models() != before, "so the text side reads it again"
        house.hub.close()
        house.host.close()

    asyncio.run(scenario())


def test_everything_comes_back_when_all_has_gone(roots: Path, wanted: Wanted) -> None:
    async def scenario() -> None:
        rng = random.Random(1)
        configs = [
            make_pool_config({"models": [{"name": n, "path": p}]}, source="test")
            for n, p in (("a", "ant"), ("a", "bee"), ("b", "cat"), ("a", "ant"))
        ]
        house = House(roots, configs[0], rng, 4 * MIB)
        building = asyncio.create_task(house.catalog.run_builds())
        for config in configs:
            assert not (await house.catalog.apply(config, roots)).failed
            while house.catalog._jobs or house.catalog._building or house.leaving:
                house.forget_one()
                await asyncio.sleep(0.001)
            house.check(wanted)
            (bind,) = house.assigned.values()
            assert house.catalog._places.used_bytes == bind.image.num_bytes
        house.catalog.stop_building()
        await building
        house.hub.close()
        house.host.close()

    asyncio.run(scenario())

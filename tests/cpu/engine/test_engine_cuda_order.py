"""What the CPU executor is tested for, asked of the CUDA executor on a stand-in device.

The stand-in is as lazy as a device may be, so what these tests hold is the order of everything.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_engine_cpu_executor as on_cpu
from test_engine_cpu_executor import (  # noqa: F401 (run here on another engine)
    test_a_failing_action_fails_alone_with_what_waits_for_it,
    test_a_flipped_bit_in_the_host_store_is_caught,
    test_a_step_fails_with_the_load_it_follows,
    test_a_step_follows_the_load_of_its_model,
    test_bind_checks_that_the_parts_fit,
    test_other_dtypes,
    test_park_drop_load_and_resume_elsewhere,
    test_plain_run_equals_the_model_alone,
    test_refusals_leave_everything_as_it_was,
    test_repeat_ends_with_the_first_finished_row,
    test_repeat_equals_single_steps,
    test_repeat_samples_and_masks_like_single_steps,
    test_rows_of_all_kinds_in_one_step,
    test_stop_ids_end_and_min_tokens_mask,
    test_submit_refuses_what_only_a_bug_can_ask,
    wanted,
)

from support.engine_kit import Engine, TinyModel, row, tiny_models, unit_for
from support.fake_device import FakeDevice
from weft.core.actions import Interrupt
from weft.core.events import Done, StepDone
from weft.core.request import Extent
from weft.engine.cuda_executor import CudaExecutor
from weft.engine.cuda_steps import AHEAD


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    folder: Path = tmp_path_factory.mktemp("models")
    return tiny_models(folder, {"a": {}, "b": {"family": "qwen2", "tied": True}}, dtype="float64")


@pytest.fixture(params=[0, 1, 2])
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(autouse=True)
def _cuda_engines(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The tests that make their own engine get this one."""

    def make(*args: Any, **options: Any) -> Engine:
        options = {"verify": True, "device": FakeDevice(seed), **options}
        return Engine(*args, make=CudaExecutor, **options)

    monkeypatch.setattr(on_cpu, "Engine", make)


@pytest.fixture
def engine(models: dict[str, TinyModel], seed: int) -> Iterator[Engine]:
    device = FakeDevice(seed)
    with Engine(models, unit_for(models), make=CudaExecutor, device=device, verify=True) as made:
        yield made
    assert not device.registered, "the host store stays registered"
    assert all(not stream.work for stream in device.streams)


def test_an_interrupt_ends_a_repeat_early(engine: Engine) -> None:
    on_cpu.start(engine)
    run = engine.run("a", [row(len(on_cpu.PROMPT), None)], repeat=16)
    engine.submit(run)
    stop = engine.submit(Interrupt(id=engine.next_id(), target=run.id))
    engine.wait(run.id, stop)
    assert 1 <= len(engine.drawn[run.id]) <= AHEAD, "what was launched counts, no more follows"
    late = engine.submit(Interrupt(id=engine.next_id(), target=run.id))
    assert isinstance(engine.wait(late)[0], Done), "an interrupt may come too late"


def test_close_ends_every_action_once(models: dict[str, TinyModel], seed: int) -> None:
    device = FakeDevice(seed)
    engine = Engine(models, unit_for(models), make=CudaExecutor, device=device)
    on_cpu.start(engine)
    base = engine.weight_granules("a")
    runs = [engine.run("a", [row(len(on_cpu.PROMPT), None)], repeat=16)]
    extent = Extent(engine.unit.host_offset, 2 * engine.models["a"].spec.page_bytes)
    park = engine.copy_kv("a", "host", on_cpu.PAGES[:2], [extent], after=(runs[0].id,))
    drop = engine.drop("a", range(base), after=(runs[0].id,))
    unmap = engine.unmap_kv("a", {0: base}, after=(park.id, drop.id))
    actions = [*runs, park, drop, unmap]
    for action in actions:
        engine.submit(action)
    engine.executor.close()
    engine.collect(engine.executor.poll())
    assert {action.id for action in actions} <= engine.ends.keys()
    assert isinstance(engine.ends[runs[0].id], StepDone), "what runs is finished"
    engine.executor.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("weft-")]
    assert not device.registered

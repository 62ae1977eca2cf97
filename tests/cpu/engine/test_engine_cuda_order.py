"""What the CPU executor is tested for, asked of the CUDA executor on a stand-in device.

The stand-in is as lazy as a device may be, so what these tests hold is the order of everything.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_engine_cpu_executor import (  # noqa: F401 (run here on another engine)
    test_a_flipped_bit_in_the_host_store_is_caught,
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

from support.engine_kit import Engine, TinyModel, tiny_models, unit_for
from support.fake_device import FakeDevice
from weft.engine.cuda_executor import CudaExecutor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    folder: Path = tmp_path_factory.mktemp("models")
    return tiny_models(folder, {"a": {}, "b": {"family": "qwen2", "tied": True}}, dtype="float64")


@pytest.fixture(params=[0, 1, 2])
def device(request: pytest.FixtureRequest) -> FakeDevice:
    return FakeDevice(seed=request.param)


@pytest.fixture
def engine(models: dict[str, TinyModel], device: FakeDevice) -> Iterator[Engine]:
    with Engine(models, unit_for(models), make=CudaExecutor, device=device, verify=True) as made:
        yield made
    assert not device.registered, "the host store stays registered"
    assert all(not stream.work for stream in device.streams)

"""How large the host store is, who lies where in it, and what a broken model does to the others."""

import itertools
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.tiny import tiny_checkpoint
from weft.config.pool_config import PoolConfig
from weft.core.errors import WeftError
from weft.engine.base import ImageRef
from weft.memory.host_store import HostStore
from weft.memory.limits import host_store_bytes, memory_limit_bytes
from weft.node import images
from weft.node.images import BuildStopped, ImagePlaces, build, plan_store

MIB = 1 << 20


def machine(root: Path, mem_kib: int, cgroup: str, limits: dict[str, str]) -> Path:
    for name, text in {
        "proc/meminfo": f"MemTotal: {mem_kib} kB\nMemFree: 1 kB\n",
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{k}": v for k, v in limits.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected_mib"),
    [
        ("0::/\n", {}, 1024),
        ("0::/a/b\n", {"memory.max": "max", "a/memory.max": str(300 * MIB)}, 300),
        ("0::/a\n", {"a/memory.max": str(9000 * MIB)}, 1024),
        ("0::/outside/us\n", {"memory.max": str(200 * MIB)}, 200),
        ("4:cpu,memory:/x\n3:pids:/y\n", {"memory/x/memory.limit_in_bytes": str(100 * MIB)}, 100),
        ("4:memory:/x\n", {"memory/memory.limit_in_bytes": str(1 << 62)}, 1024),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, cgroup: str, limits: dict[str, str], expected_mib: int
) -> None:
    assert memory_limit_bytes(machine(tmp_path, 1 << 20, cgroup, limits)) == expected_mib * MIB


def test_this_machine_has_a_limit() -> None:
    assert memory_limit_bytes() > 64 * MIB


def test_the_store_leaves_headroom() -> None:
    assert host_store_bytes(None, 1000) == 500
    assert host_store_bytes(900, 1000) == 900
    with pytest.raises(WeftError, match="ask for at most 90M"):
        host_store_bytes(91 * MIB, 100 * MIB)


def pool(*names: str, **more: Any) -> PoolConfig:
    models = [{"name": name, "path": name.split("-")[0]} for name in names]
    return msgspec.convert({"models": models, **more}, PoolConfig)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("ant", "bee", "cat")):
        tiny_checkpoint(tmp_path / name, seed=seed)
    return tmp_path


def test_images_lie_one_after_the_other_and_parked_kv_behind(folder: Path) -> None:
    plan = plan_store(pool("ant", "bee", "cat"), folder, 64 * MIB)
    offsets = [model.image.offset for model in plan.models]
    assert offsets == [0, 2 * MIB, 4 * MIB] and not plan.failed
    end = offsets[-1] + plan.models[-1].image.num_bytes
    assert plan.parked_offset >= end and plan.parked_offset % 4096 == 0
    assert 64 * MIB - 4096 <= plan.store_bytes <= 64 * MIB


def test_models_of_the_same_files_share_an_image_and_others_never(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "ant")
    for file in ("config.json", "model.safetensors"):  # same size, same time, other weights
        os.utime(folder / "bee" / file, ns=(5, 5))
        os.utime(folder / "cat" / file, ns=(5, 5))
    plan = plan_store(pool("ant", "link", "bee", "cat", "ant-2"), folder, 64 * MIB)
    groups: dict[int, list[str]] = {}
    for model in plan.models:
        groups.setdefault(model.image.offset, []).append(model.config.name)
    assert list(groups.values()) == [["ant", "link", "ant-2"], ["bee"], ["cat"]]


def test_parked_kv_of_large_stores_begins_at_a_chunk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "CHUNK_BYTES", 8 * MIB)
    plan = plan_store(pool("ant"), folder, 64 * MIB)
    assert plan.parked_offset == 8 * MIB
    assert plan.parked_bytes <= 64 * MIB - plan.images_bytes


def break_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\xff" * 64)


def break_config(path: Path) -> None:
    (path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')


def remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.mark.parametrize("harm", [break_header, break_config, remove])
def test_a_broken_model_gets_a_reason_and_the_others_their_place(folder: Path, harm: Any) -> None:
    harm(folder / "bee")
    plan = plan_store(pool("ant", "bee", "cat"), folder, 64 * MIB)
    assert [model.config.name for model in plan.models] == ["ant", "cat"]
    (failed,) = plan.failed
    assert failed.config.name == "bee" and "bee" in failed.reason


def test_a_model_that_does_not_fit_fails_alone(folder: Path) -> None:
    tiny_checkpoint(folder / "elephant", hidden=512, intermediate=2048)
    plan = plan_store(pool("ant", "elephant", "cat"), folder, 5 * MIB)
    assert [model.config.name for model in plan.models] == ["ant", "cat"]
    assert "raise engine.host_memory" in plan.failed[0].reason


def test_room_is_kept_for_models_that_come_later(folder: Path) -> None:
    plan = plan_store(pool("ant", "bee"), folder, 64 * MIB, spare_bytes=None)
    left = 64 * MIB - plan.images_bytes
    assert plan.places.room_bytes - plan.images_bytes == pytest.approx(left / 4, abs=4096)
    assert plan.parked_offset >= plan.places.room_bytes
    assert 64 * MIB - 8192 <= plan.store_bytes <= 64 * MIB
    assert plan.places.take("new", 8 * MIB) is not None
    plan = plan_store(pool("ant"), folder, 64 * MIB, spare_bytes=1 << 40)
    assert plan.parked_bytes == 0 and plan.store_bytes <= 64 * MIB


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=60))
def test_images_never_overlap_and_free_places_are_used_again(
    story: list[tuple[int, bool]],
) -> None:
    """Eight images of different sizes come and go, some with several users."""
    places = ImagePlaces(64 * MIB)
    users: dict[str, int] = {}
    lies: dict[str, ImageRef] = {}
    for number, comes in story:
        key, size = f"k{number}", (1 + 3 * number) * MIB
        if comes:
            image = places.take(key, size)
            if image is None:
                continue
            assert lies.setdefault(key, image) == image
            users[key] = users.get(key, 0) + 1
        elif key in users:
            users[key] -= 1
            free = places.give(key)
            assert (free is not None) == (users[key] == 0)
            if free is not None:
                assert free == lies.pop(key)
                del users[key]
        ranges = sorted((r.offset, r.offset + r.num_bytes) for r in lies.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        assert all(offset % (2 * MIB) == 0 for offset, _ in ranges)
        assert not ranges or ranges[-1][1] <= places.room_bytes
    if not lies:
        whole = places.take("all", 64 * MIB)
        assert whole is not None and whole.offset == 0


def test_an_image_is_built_into_its_place(folder: Path) -> None:
    plan = plan_store(pool("ant", "bee"), folder, 16 * MIB)
    host = HostStore.create(plan.store_bytes)
    ant, bee = plan.models
    seen: list[int] = []
    assert build(ant, host, seen.append, 1) is None
    assert sum(seen) == ant.image.num_bytes
    assert np.frombuffer(host.view(0, ant.image.num_bytes), np.uint8).any()
    weights = folder / "bee" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    reason = build(bee, host, seen.append, 1)
    assert reason is not None and "bee" in reason
    host.close()


def test_a_build_can_be_stopped(folder: Path) -> None:
    plan = plan_store(pool("ant"), folder, 16 * MIB)
    host = HostStore.create(plan.store_bytes)

    def stop(_: int) -> None:
        raise BuildStopped

    with pytest.raises(BuildStopped):
        build(plan.models[0], host, stop, 1)
    host.close()


def test_a_path_that_leads_to_itself_fails_alone(folder: Path) -> None:
    (folder / "loop").symlink_to(folder / "loop")
    plan = plan_store(pool("loop", "ant"), folder, 64 * MIB)
    assert [model.config.name for model in plan.models] == ["ant"]
    assert "no such file" in plan.failed[0].reason

"""The CUDA arena: contents follow granules, addresses stay, refusals change nothing."""

import threading

import pytest
import torch

from support.gpu import needs_gpu
from weft.memory.base import ArenaError

pytestmark = needs_gpu

MIB = 1 << 20
GRANULE = 2 * MIB


def test_contents_follow_granules_and_addresses_stay() -> None:
    from weft.memory.arena_cuda import CudaArena

    torch.zeros(1, device="cuda")
    before, _ = torch.cuda.mem_get_info()
    arena = CudaArena(GRANULE, 8)
    arena.reserve("a", 3 * GRANULE, 5 * GRANULE + 1)
    arena.reserve("b", 1, GRANULE)
    kv = arena.tensor("a", "kv")
    address = kv.data_ptr()
    assert kv.shape == (6 * GRANULE,) and kv.is_cuda and kv.dtype == torch.uint8
    arena.map("a", "kv", [0, 1, 4], [7, 2, 5])
    for place, value in ((0, 10), (1, 11), (4, 14)):
        kv[place * GRANULE : (place + 1) * GRANULE] = value
    torch.cuda.synchronize()
    arena.unmap("a", "kv", [1, 0], [2, 7])
    arena.map("a", "kv", [5, 3], [7, 2])
    arena.map("b", "weights", [0], [0])
    assert arena.tensor("a", "kv").data_ptr() == address
    for place, value in ((5, 10), (3, 11), (4, 14)):
        part = kv[place * GRANULE : (place + 1) * GRANULE]
        assert int(part.min()) == int(part.max()) == value
    assert arena.mapped()["a/kv"] == (-1, -1, -1, 2, 5, 7)
    assert arena.mapped()["b/weights"] == (0,)
    with pytest.raises(ArenaError, match="still holds"):
        arena.release("a")
    arena.close()
    arena.close()
    after, _ = torch.cuda.mem_get_info()
    assert abs(after - before) < 4 * MIB, "physical memory came back"


def test_a_refused_order_changes_nothing() -> None:
    from weft.memory.arena_cuda import CudaArena

    arena = CudaArena(GRANULE, 4)
    try:
        arena.reserve("a", GRANULE, 4 * GRANULE)
        arena.map("a", "kv", [0], [0])
        before = arena.mapped()
        for at, granules in (([1, 0], [1, 2]), ([1], [0]), ([9], [1]), ([1], [4]), ([1, 2], [1])):
            with pytest.raises(ArenaError):
                arena.map("a", "kv", at, granules)
            assert arena.mapped() == before
        with pytest.raises(ArenaError):
            arena.unmap("a", "kv", [0], [1])
        with pytest.raises(ArenaError, match="reserved already"):
            arena.reserve("a", 1, 1)
        assert arena.mapped() == before
    finally:
        arena.close()


def test_more_granules_than_the_device_has() -> None:
    from weft.memory.arena_cuda import CudaArena

    _, total = torch.cuda.mem_get_info()
    granule = 1 << 32
    before, _ = torch.cuda.mem_get_info()
    with pytest.raises(ArenaError, match="granules"):
        CudaArena(granule, total // granule + 2)
    after, _ = torch.cuda.mem_get_info()
    assert abs(after - before) < 4 * MIB


def test_another_thread_maps() -> None:
    from weft.engine.cuda_device import CudaDevice
    from weft.memory.arena_cuda import CudaArena

    device = CudaDevice()
    arena = CudaArena(GRANULE, 2)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            device.prepare_thread()
            for _ in range(20):
                arena.map("a", "kv", [0, 1], [1, 0])
                arena.unmap("a", "kv", [0, 1], [1, 0])
            arena.map("a", "kv", [0, 1], [1, 0])
        except BaseException as error:
            failures.append(error)

    try:
        arena.reserve("a", 1, 2 * GRANULE)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not failures
        kv = arena.tensor("a", "kv")
        kv.fill_(3)
        assert int(kv.sum(dtype=torch.int64)) == 3 * 2 * GRANULE
        torch.cuda.synchronize()
    finally:
        arena.close()

"""What a worker builds before it says Hello."""

import threading

import pytest

from weft.core.errors import WeftError
from weft.memory.host_store import HostStore
from weft.transport.messages import WorkerConfig
from weft.worker.process import build_unit

CONFIG = WorkerConfig(
    unit=0,
    incarnation=1,
    device="cpu",
    device_memory_bytes=4 << 20,
    host_store_bytes=1 << 20,
    host_offset=0,
    host_bytes=1 << 20,
    policy="nonsense",
)


def test_a_unit_that_cannot_be_built_leaves_no_threads() -> None:
    """Threads that nobody ends keep the process: the node agent would wait for its end."""
    host = HostStore.create(1 << 20)
    before = set(threading.enumerate())
    with pytest.raises(WeftError, match="unknown policy"):
        build_unit(CONFIG, host)
    left = set(threading.enumerate()) - before
    host.close()
    assert left == set()

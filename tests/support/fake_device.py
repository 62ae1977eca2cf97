"""A stand-in for CUDA on the CPU, as lazy as a device may be: queued copies run only when somebody
waits for them (or by chance when asked), so an order that forgets to wait shows at once.

Steps run when they are launched; their streams make what they wait for happen first.
"""

import contextlib
import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from weft.attention.base import AttentionBackend
from weft.attention.reference import ReferenceAttention
from weft.core.unit import UnitSpec
from weft.engine.cuda_device import Mark
from weft.engine.runner import Sampler
from weft.engine.sampler import sample
from weft.kernels.quant_weight import QuantMatmul, TorchQuantMatmul
from weft.kernels.word_sum import word_sum
from weft.memory.arena_cpu import CpuArena
from weft.memory.base import Arena
from weft.models.lora import LoraOps, TorchLora
from weft.models.ops import Ops, TorchOps


class FakeMark:
    def __init__(self, stream: "FakeStream", position: int) -> None:
        self.stream, self.position = stream, position

    def query(self) -> bool:
        self.stream.device.chance(self.stream)
        with self.stream.device.lock:
            return self.stream.done >= self.position

    def synchronize(self) -> None:
        with self.stream.device.lock:
            self.stream.run_to(self.position)


class FakeStream:
    def __init__(self, device: "FakeDevice", lazy: bool) -> None:
        self.device, self.lazy = device, lazy
        self.queued = self.done = 0
        self.work: deque[Callable[[], object]] = deque()

    def push(self, work: Callable[[], object]) -> None:
        with self.device.lock:
            self.work.append(work)
            self.queued += 1
            if not self.lazy:
                self.run_to(self.queued)

    def run_to(self, position: int) -> None:
        while self.done < position:
            self.work.popleft()()
            self.done += 1

    def record(self) -> FakeMark:
        self.push(lambda: None)
        return FakeMark(self, self.queued)

    def wait(self, mark: Mark) -> None:
        self.push(mark.synchronize)

    def copy(self, to: Literal["host", "device"], device: int, host: int, num_bytes: int) -> None:
        self.device.check_registered(host, num_bytes)
        target, source = (device, host) if to == "device" else (host, device)
        self.push(lambda: ctypes.memmove(target, source, num_bytes))

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        before = getattr(self.device.current, "stream", None)
        self.device.current.stream = self
        try:
            yield
        finally:
            self.device.current.stream = before

    def synchronize(self) -> None:
        with self.device.lock:
            self.run_to(self.queued)


class FakeDevice:
    """Stands in for `engine.cuda_device.CudaDevice`."""

    def __init__(self, seed: int = 0) -> None:
        self.lock = threading.RLock()
        self.current = threading.local()
        self.streams: list[FakeStream] = []
        self.registered: dict[int, int] = {}
        self._random = random.Random(seed)

    def chance(self, stream: FakeStream) -> None:
        """Now and then the device gets on with something, whoever asks."""
        with self.lock:
            for other in self.streams:
                if other.work and self._random.random() < 0.5:
                    other.run_to(other.done + 1)

    def check_registered(self, address: int, num_bytes: int) -> None:
        for begin, size in self.registered.items():
            if begin <= address and address + num_bytes <= begin + size:
                return
        raise RuntimeError("a copy touches memory that is not registered, or two registrations")

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def stream(self) -> FakeStream:
        # The executor makes its copy streams first, then those of the lanes.
        self.streams.append(FakeStream(self, lazy=len(self.streams) < 2))
        return self.streams[-1]

    def arena(self, unit: UnitSpec) -> Arena:
        return CpuArena(unit.granule_bytes, unit.num_granules, poison=True)

    def attention(self) -> AttentionBackend:
        return ReferenceAttention()

    def graphs(self, unit: UnitSpec, *, enabled: bool) -> None:
        return None

    def ops(self) -> Ops:
        return TorchOps()

    def lora(self) -> LoraOps:
        return TorchLora()

    def quant_matmul(self) -> QuantMatmul:
        return TorchQuantMatmul()

    def sampler(self) -> Sampler:
        return sample

    def prepare_thread(self) -> None:
        pass

    def register(self, address: int, num_bytes: int) -> None:
        self.registered[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def elapsed_ns(self, begin: Mark, end: Mark) -> int:
        assert begin.query() and end.query()
        return 1

    def sums(self, memory: torch.Tensor, offsets: list[int], num_bytes: int) -> torch.Tensor:
        out = torch.zeros(len(offsets), dtype=torch.int64)

        def work() -> None:
            for i, at in enumerate(offsets):
                out[i] = word_sum(memory[at : at + num_bytes])

        self.current.stream.push(work)
        return out

    def cap_allocator(self) -> None:
        pass

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()

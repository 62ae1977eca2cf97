"""The device as the executor sees it: streams, marks, copies, registration. One implementation for
CUDA; the executor's logic is tested on the CPU against a stand-in with the same interface."""

import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from weft.attention.base import AttentionBackend
from weft.core.unit import UnitSpec
from weft.engine.graphs import DecodeGraphs
from weft.engine.runner import Sampler
from weft.engine.sampler import SamplingBatch, sample
from weft.kernels.quant_weight import QuantMatmul
from weft.memory.base import Arena
from weft.models.lora import LoraOps
from weft.models.ops import Ops

if TYPE_CHECKING:
    from weft.attention.triton import TritonAttention


class Mark(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """Whether the device has passed it. Never waits."""
        ...

    def synchronize(self) -> None:
        """Wait for it, asleep, without the interpreter's lock."""
        ...


class Stream(Protocol):
    """Work in order. Used by one thread at a time."""

    def record(self) -> Mark: ...

    def wait(self, mark: Mark) -> None:
        """What is queued from now on runs after `mark` (of any stream)."""
        ...

    def copy(self, to: Literal["host", "device"], device: int, host: int, num_bytes: int) -> None:
        """Queue a copy between two addresses. The host side must be registered."""
        ...

    def use(self) -> AbstractContextManager[Any]:
        """Torch operations inside go to this stream."""
        ...

    def synchronize(self) -> None: ...


class Device(Protocol):
    """Everything a `CudaExecutor` asks of a device."""

    @property
    def torch_device(self) -> torch.device: ...

    def stream(self) -> Stream: ...

    def arena(self, unit: UnitSpec) -> Arena: ...

    def attention(self) -> AttentionBackend: ...

    def graphs(self, unit: UnitSpec, *, enabled: bool) -> DecodeGraphs | None:
        """For one lane. Not enabled: the same steps, launch by launch. None: nothing like it."""
        ...

    def ops(self) -> Ops: ...

    def lora(self) -> LoraOps: ...

    def quant_matmul(self) -> QuantMatmul: ...

    def sampler(self) -> Sampler: ...

    def prepare_thread(self) -> None:
        """To be called once by every thread that uses the device."""
        ...

    def register(self, address: int, num_bytes: int) -> None: ...

    def unregister(self, address: int) -> None: ...

    def elapsed_ns(self, begin: Mark, end: Mark) -> int:
        """Device time between two passed marks."""
        ...

    def sums(self, memory: torch.Tensor, offsets: list[int], num_bytes: int) -> torch.Tensor:
        """Queue checksums of pieces of device memory on the stream in use; an int64 tensor on the
        host, filled when the stream has come so far (`kernels.checksum`)."""
        ...

    def cap_allocator(self) -> None:
        """Keep torch's allocator within what is free now: the arena has the rest."""
        ...

    def synchronize(self) -> None: ...


class CudaStream:
    """A CUDA stream and the copies queued on it."""

    def __init__(self, device: torch.device, cu: Any, check: Any) -> None:
        self.torch = torch.cuda.Stream(device)
        self._cu = cu
        self._check = check
        self._handle = cu.CUstream(self.torch.cuda_stream)

    def record(self) -> torch.cuda.Event:
        # blocking: a thread that waits sleeps instead of spinning on a core.
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self.torch)
        return event

    def wait(self, mark: Any) -> None:
        self.torch.wait_event(mark)

    def copy(self, to: Literal["host", "device"], device: int, host: int, num_bytes: int) -> None:
        if to == "device":
            self._check(self._cu.cuMemcpyHtoDAsync(device, host, num_bytes, self._handle))
        else:
            self._check(self._cu.cuMemcpyDtoHAsync(host, device, num_bytes, self._handle))

    def use(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.torch)

    def synchronize(self) -> None:
        self.torch.synchronize()


class CudaDevice:
    """One CUDA device, by torch and `cuda.bindings`."""

    ALLOCATOR_MARGIN_BYTES = 512 << 20
    """Left free beside arena and allocator: the driver's own needs, kernels loaded later."""

    def __init__(self, index: int | None = None) -> None:
        from weft.memory.cuda import check, driver

        torch.cuda.init()
        self._device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self._cu, self._check = driver(), check
        check(self._cu.cuInit(0))
        torch.zeros(1, device=self._device)
        self._context = check(self._cu.cuDevicePrimaryCtxRetain(self._device.index))
        self._prepared = threading.local()
        self._ops: Ops | None = None
        self.prepare_thread()

    @property
    def torch_device(self) -> torch.device:
        return self._device

    def stream(self) -> CudaStream:
        return CudaStream(self._device, self._cu, self._check)

    def arena(self, unit: UnitSpec) -> Arena:
        from weft.memory.arena_cuda import CudaArena

        return CudaArena(unit.granule_bytes, unit.num_granules, device=self._device)

    def graphs(self, unit: UnitSpec, *, enabled: bool) -> DecodeGraphs | None:
        return DecodeGraphs(unit, self._device, self._triton(), self.lora(), enabled=enabled)

    def attention(self) -> AttentionBackend:
        return self._triton()

    def _triton(self) -> "TritonAttention":
        from weft.attention.triton import TritonAttention

        properties = torch.cuda.get_device_properties(self._device)
        return TritonAttention(num_sms=properties.multi_processor_count)

    def ops(self) -> Ops:
        from weft.kernels.elementwise import TritonOps

        # One for all models: its scratch is of a stream, 9 MB that each of them would have again.
        if self._ops is None:
            self._ops = TritonOps()
        return self._ops

    def lora(self) -> LoraOps:
        from weft.kernels.lora import TritonLora

        return TritonLora()

    def quant_matmul(self) -> QuantMatmul:
        from weft.kernels import quant_matmul as ours

        properties = torch.cuda.get_device_properties(self._device)
        large = properties.shared_memory_per_block_optin >= ours.LARGEST_TILE_BYTES
        return ours.TritonQuantMatmul(
            properties.multi_processor_count,
            fp8=(properties.major, properties.minor) >= (8, 9),
            prefill_tokens=ours.PREFILL_TOKENS if large else ours.SMALL_PREFILL_TOKENS,
        )

    def sampler(self) -> Sampler:
        from weft.kernels.sampling import draw

        def draw_or_sample(logits_SV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
            truncated = batch.any_random and (batch.any_truncated or batch.any_min_p)
            if truncated or batch.any_masked or logits_SV.dtype == torch.float64:
                return sample(logits_SV, batch)
            return draw(logits_SV, batch.temperature, batch.seed, batch.output_index)

        return draw_or_sample

    def prepare_thread(self) -> None:
        # The runtime makes a context current lazily, the driver's calls need it at once.
        if not getattr(self._prepared, "done", False):
            self._check(self._cu.cuCtxSetCurrent(self._context))
            torch.cuda.set_device(self._device)
            self._prepared.done = True

    def register(self, address: int, num_bytes: int) -> None:
        portable = self._cu.CU_MEMHOSTREGISTER_PORTABLE
        self._check(self._cu.cuMemHostRegister(address, num_bytes, portable))

    def unregister(self, address: int) -> None:
        self._check(self._cu.cuMemHostUnregister(address))

    def elapsed_ns(self, begin: Any, end: Any) -> int:
        return int(begin.elapsed_time(end) * 1e6)

    def sums(self, memory: torch.Tensor, offsets: list[int], num_bytes: int) -> torch.Tensor:
        from weft.kernels.checksum import device_sums

        on_device = device_sums(memory, offsets, num_bytes)
        on_host = torch.empty(len(offsets), dtype=torch.int64, pin_memory=True)
        return on_host.copy_(on_device, non_blocking=True)

    def cap_allocator(self) -> None:
        free, total = torch.cuda.mem_get_info(self._device)
        held = torch.cuda.memory_reserved(self._device)
        allowed = max(held, held + free - self.ALLOCATOR_MARGIN_BYTES)
        torch.cuda.set_per_process_memory_fraction(allowed / total, self._device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

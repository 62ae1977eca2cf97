"""The executor on CUDA: actions become work on streams, ordered by marks instead of by waiting.

An action is *issued* when all its work is queued on a stream and *ended* when the device has passed
it. What follows an issued action on the same stream may be issued at once; on another stream it
waits for the action's mark on the device; only mapping and unmapping wait for marks on the host.

Who does what: the worker loop launches steps (in `submit` and `poll`) and ends what the device has
passed (in `poll`); a thread per copy direction queues copies; mapping threads map and unmap; a
thread per stream sleeps until the device has passed its next mark and makes `wait_fd` readable.
Nothing ever synchronises the device, except `close`.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from weft.core.actions import (
    CopyKv,
    Drop,
    Interrupt,
    Load,
    MapKv,
    Run,
    UnitAction,
    UnmapKv,
)
from weft.core.errors import WeftError
from weft.core.events import CopyDone, Done, UnitEvent
from weft.core.ids import ActionId, ModelName
from weft.core.model import AdapterShape, Architecture, ModelSpec
from weft.core.unit import UnitSpec
from weft.engine.adapters import BoundAdapter, StepAdapters, bind_adapter
from weft.engine.base import ImageRef
from weft.engine.book import ActionBook, ExecutorClosed, LoadProgress
from weft.engine.bound import BoundModels
from weft.engine.checksums import Checksums
from weft.engine.copies import host_tensor, kv_pieces, range_pieces, total_bytes
from weft.engine.cuda_device import CudaDevice, Device, Stream
from weft.engine.cuda_order import Channel, Copy, CopyChannel, Lane, Marks
from weft.engine.cuda_steps import Steps
from weft.engine.cuda_verify import Verifier
from weft.engine.failures import failure
from weft.engine.mapped import remap
from weft.engine.model import BoundModel, bind_model
from weft.engine.runner import LogitsTap, Runner
from weft.memory.host_registry import HostRegistry
from weft.memory.host_store import HostStore
from weft.models.decoder import Decoder

log = logging.getLogger(__name__)

MAPPERS = 2
"""Mapping threads: one may wait for a long copy while the other maps."""


class CudaExecutor:
    """Implements `engine.base.Executor`.

    threads: torch's threads on the CPU, for what little runs there; None leaves torch's default.
    verify: checksums of parked pages and weight images (promise 1), computed on the device. For
    tests, like fault (called before an action is executed, may raise) and logits_tap (see Runner).
    device: a stand-in for tests; default the current CUDA device. graphs: replay decode steps as
    CUDA graphs.
    """

    def __init__(
        self,
        unit: UnitSpec,
        host: HostStore,
        *,
        threads: int | None = None,
        verify: bool = False,
        fault: Callable[[UnitAction], None] | None = None,
        logits_tap: LogitsTap | None = None,
        device: Device | None = None,
        graphs: bool = True,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.unit = unit
        self._device: Device = device or CudaDevice()
        self._arena = self._device.arena(unit)
        self._arena_lock = threading.Lock()
        self._host: torch.Tensor | None = host_tensor(host)
        self._base = self._host.data_ptr()
        self._verifier = (
            Verifier(self._device, self._arena, self._arena_lock, self._host) if verify else None
        )
        self._fault = fault
        self._models = BoundModels(self._arena, self._arena_lock, unit.granule_bytes)
        self._marks = Marks()
        self._mappings: queue.SimpleQueue[MapKv | UnmapKv | Drop | None] = queue.SimpleQueue()
        self._remapped: deque[MapKv | UnmapKv | Drop] = deque()
        """Carried out, not yet ended."""
        self._copies = {
            "device": CopyChannel(self._device.stream()),
            "host": CopyChannel(self._device.stream()),
        }
        self._lanes = self._make_lanes(logits_tap, graphs)
        self._book = ActionBook(self._dispatch, unit.lanes)
        self._steps = Steps(
            self._book,
            self._device,
            self._marks,
            self._verifier,
            self._models.__getitem__,
            self._begin,
            self._fail,
        )
        self._registry = HostRegistry(
            host.num_bytes,
            unit.host_chunk_bytes,
            lambda offset, num_bytes: self._device.register(self._base + offset, num_bytes),
            lambda offset: self._device.unregister(self._base + offset),
            self._device.prepare_thread,
        )
        self._registry.want(unit.host_offset, unit.host_bytes)
        self._device.cap_allocator()
        self._watchers = [self._start(self._watch, channel) for channel in self._channels()]
        self._workers = [
            *(self._start(self._copy, channel) for channel in self._copies.values()),
            *(self._start(self._map) for _ in range(MAPPERS)),
        ]
        self._closed = False

    @property
    def checksums(self) -> Checksums | None:
        """What was compared, where `verify` is on."""
        return None if self._verifier is None else self._verifier.checksums

    # -- Executor -------------------------------------------------------------------------------

    def bind(
        self,
        model: ModelSpec,
        arch: Architecture,
        image: ImageRef,
        adapter: AdapterShape | None = None,
    ) -> None:
        if arch.dtype == "float64" and self._device.torch_device.type == "cuda":
            raise WeftError(f"{model.name}: float64 is for the CPU; use float32 or less on CUDA")
        self._device.prepare_thread()
        self._registry.want(image.offset, image.num_bytes, first=True)
        first = self._lanes[0].stream
        with self._arena_lock, first.use():
            if adapter is not None:
                bound = bind_adapter(self._arena, model, arch, adapter, image)
                self._models.adapters[model.name] = bound
            else:
                self._models[model.name] = bind_model(
                    self._arena,
                    self.unit,
                    model,
                    arch,
                    image,
                    partial(Decoder, ops=self._device.ops(), matmul=self._device.quant_matmul()),
                )
        made = first.record()
        for lane in self._lanes[1:]:
            lane.stream.wait(made)

    def unbind(self, model: ModelName) -> None:
        bound = self._models.get(model)
        self._models.unbind(model, self._book)
        for lane in self._lanes if bound is not None else ():
            lane.runner.forget(bound)

    def submit(self, action: UnitAction) -> None:
        """Launches at once what is free to run: some milliseconds for a step."""
        self._book.submit(action)
        if isinstance(action, Run):
            self._device.prepare_thread()
            for lane in self._lanes:
                self._steps.launch_ready(lane)

    def progress(self) -> int:
        return self._book.load_parts() + (self._registry.registered_bytes() >> 20)

    def poll(self) -> Sequence[UnitEvent]:
        """Ends what the device has passed and launches what became free."""
        self._device.prepare_thread()
        # Taken first: a mark passed after its query makes the descriptor readable once more.
        events = self._book.poll()
        while self._end_passed():
            pass
        for lane in self._lanes:
            self._steps.launch_ready(lane)
        return (*events, *self._book.drain())

    def wait_fd(self) -> int:
        return self._book.wait_fd()

    def check_integrity(self, *, mapped: dict[str, tuple[int, ...]]) -> None:
        """Meaningful only while no action is in flight."""
        self._models.check_integrity(mapped)

    def registered_bytes(self) -> int:
        """Bytes of the host store that copies can reach without waiting."""
        return self._registry.registered_bytes()

    def graph_kinds(self) -> int:
        """Kinds of decode steps that replay a graph."""
        return sum(lane.runner.graph_kinds for lane in self._lanes)

    def close(self) -> None:
        """Let what is on the device finish, fail the rest, give everything back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._device.prepare_thread()
        self._book.begin_close()
        for channel in self._copies.values():
            channel.actions.put(None)
        for _ in range(MAPPERS):
            self._mappings.put(None)
        self._registry.stop()
        for thread in self._workers:
            thread.join()
        self._device.synchronize()
        for lane in self._lanes:
            lane.runner.close()
            while lane.ready:
                self._book.end(failure(lane.ready.popleft().id, ExecutorClosed()))
        while self._end_passed():
            pass
        for channel in self._channels():
            channel.marks.put(None)
        for thread in self._watchers:
            thread.join()
        self._book.end_close()
        self._registry.close()
        self._models.clear()
        self._arena.close()
        self._host = None
        if self._verifier is not None:
            self._verifier.close()

    # -- threads --------------------------------------------------------------------------------

    def _make_lanes(self, logits_tap: LogitsTap | None, graphs: bool) -> list[Lane]:
        streams = [self._device.stream() for _ in range(self.unit.lanes)]
        with streams[0].use():
            last_token = torch.zeros(
                self.unit.num_slots, dtype=torch.int64, device=self._device.torch_device
            )
            runners = [
                Runner(
                    self.unit,
                    self._device.torch_device,
                    self._device.attention(),
                    last_token,
                    sampler=self._device.sampler(),
                    adapters=StepAdapters(self._models.adapters, self._device.lora()),
                    logits_tap=logits_tap,
                    graphs=self._device.graphs(self.unit, enabled=graphs),
                )
                for _ in streams
            ]
        streams[0].synchronize()
        return [
            Lane(stream, runner=runner) for stream, runner in zip(streams, runners, strict=True)
        ]

    def _channels(self) -> list[Channel]:
        return [*self._copies.values(), *self._lanes]

    def _start(self, target: Callable[..., None], *args: object) -> threading.Thread:
        # daemon: a worker that dies without `close` must not linger.
        thread = threading.Thread(
            target=target, args=args, name=f"weft-{target.__name__[1:]}", daemon=True
        )
        thread.start()
        return thread

    def _dispatch(self, action: UnitAction) -> None:
        """Called with the book's lock held, by any thread."""
        match action:
            case Run():
                # The worker loop launches steps; whoever frees one wakes it.
                self._lanes[action.lane].ready.append(action)
                self._book.wake()
            case Load():
                self._copies["device"].actions.put(action)
            case CopyKv():
                self._copies[action.to].actions.put(action)
            case MapKv() | UnmapKv() | Drop():
                self._mappings.put(action)
            case Interrupt():
                raise ValueError("an interrupt is not executed")

    def _watch(self, channel: Channel) -> None:
        self._device.prepare_thread()
        while (mark := channel.marks.get()) is not None:
            try:
                mark.synchronize()
            except Exception:
                # The device is lost; the worker loop meets the same error in `poll` and ends.
                log.exception("a wait for the device failed")
            self._book.wake()

    def _copy(self, channel: CopyChannel) -> None:
        self._device.prepare_thread()
        while (action := channel.actions.get()) is not None:
            try:
                self._begin(action)
                if isinstance(action, Load):
                    self._issue_load(channel, action)
                else:
                    self._issue_copy(channel, action)
            except Exception as error:
                self._fail(action.id, error)

    def _map(self) -> None:
        self._device.prepare_thread()
        while (action := self._mappings.get()) is not None:
            try:
                self._begin(action)
                self._marks.wait(action.after)
                with self._arena_lock:
                    remap(self._arena, action)
                self._book.issue(action.id)
                self._remapped.append(action)
                self._book.wake()
            except Exception as error:
                self._fail(action.id, error)

    def _begin(self, action: UnitAction) -> None:
        if self._book.closing:
            raise ExecutorClosed
        if self._fault is not None:
            self._fault(action)

    def _fail(self, action: ActionId, error: Exception) -> None:
        if not isinstance(error, ExecutorClosed):
            log.warning("action %d failed", action, exc_info=error)
        self._marks.remove(action)
        self._book.end(failure(action, error))

    # -- order ----------------------------------------------------------------------------------

    def _end_passed(self) -> bool:
        """End what the device has passed and what was remapped, each after all it followed: a
        thread may know of an end before the worker loop has looked at what came before it."""
        ended = [self._end_copies(channel) for channel in self._copies.values()]
        ended += [self._steps.advance(lane) for lane in self._lanes]
        for _ in range(len(self._remapped)):
            if not self._may_end(self._remapped[0]):
                self._remapped.rotate(-1)
                continue
            self._book.end(Done(action=self._remapped.popleft().id))
            ended.append(True)
        return any(ended)

    def _may_end(self, action: UnitAction) -> bool:
        return not self._book.any_in_flight(action.after)

    # -- copies ---------------------------------------------------------------------------------

    def _issue_load(self, channel: CopyChannel, action: Load) -> None:
        model, at = self._models.to_load(action)
        image, progress = model.image, self._book.progress(action.id)
        self._registry.wait([(image.offset, image.num_bytes)])
        self._marks.wait(action.after)
        with self._arena_lock:
            self._arena.map(model.spec.name, "weights", at, action.granules)
        try:
            begin = channel.stream.record()
            sums = self._copy_extents(channel.stream, model, progress)
            check = None
            if self._verifier is not None:
                check = partial(self._verifier.check_image, model, sums)
            self._issued(channel, Copy(action, image.num_bytes, begin, channel.record(), check))
        except BaseException:
            progress.fail()
            channel.stream.synchronize()
            with self._arena_lock:
                self._arena.unmap(model.spec.name, "weights", at, action.granules)
            raise

    def _copy_extents(
        self, stream: Stream, model: BoundModel | BoundAdapter, progress: LoadProgress
    ) -> list[torch.Tensor]:
        """Queue the copies of all extents, a mark behind each. Returns their checksums if asked."""
        image, target = model.image, model.weights_bytes.data_ptr()
        sums: list[torch.Tensor] = []
        for i, extent in enumerate(model.layout.extents):
            begin = image.offset + extent.offset
            for piece in range_pieces(
                begin, extent.offset, extent.num_bytes, self.unit.host_chunk_bytes
            ):
                stream.copy(
                    "device",
                    target + piece.device_offset,
                    self._base + piece.host_offset,
                    piece.num_bytes,
                )
            if self._verifier is not None:
                sums.append(self._verifier.sum_extent(stream, model, i, extent))
            progress.advance(stream.record())
        return sums

    def _issue_copy(self, channel: CopyChannel, action: CopyKv) -> None:
        model, page_bytes = self._models[action.model], self._models[action.model].spec.page_bytes
        pieces = kv_pieces(action.pages, page_bytes, action.extents, self.unit.host_chunk_bytes)
        if any(page >= model.kv.pages.shape[0] for page in action.pages):
            raise ValueError(f"a page id is outside 0 .. {model.kv.pages.shape[0] - 1}")
        if self._verifier is not None:
            self._verifier.check_copy(model, action)
        self._registry.wait((extent.offset, extent.num_bytes) for extent in action.extents)
        stream, target = channel.stream, model.kv_bytes.data_ptr()
        self._marks.queue_behind(action.after, stream)
        begin = stream.record()
        for piece in pieces:
            stream.copy(
                action.to,
                target + piece.device_offset,
                self._base + piece.host_offset,
                piece.num_bytes,
            )
        check = None
        if self._verifier is not None and action.pages:
            check = self._verifier.sum_pages(stream, model, action)
        self._issued(channel, Copy(action, total_bytes(pieces), begin, channel.record(), check))

    def _issued(self, channel: CopyChannel, copy: Copy) -> None:
        self._marks.put(copy.action.id, channel.stream, copy.end)
        self._book.issue(copy.action.id)
        channel.flying.append(copy)
        # Its mark may have been passed already, and a step that follows it waits for its marks.
        self._book.wake()

    def _end_copies(self, channel: CopyChannel) -> bool:
        """Whether any ended."""
        count = len(channel.flying)
        while channel.flying and channel.flying[0].end.query():
            if not self._may_end(channel.flying[0].action):
                break
            copy = channel.flying.popleft()
            try:
                if copy.check is not None:
                    copy.check()
            except Exception as error:
                self._undo(copy.action)
                self._fail(copy.action.id, error)
                continue
            self._marks.remove(copy.action.id)
            self._book.end(
                CopyDone(
                    action=copy.action.id,
                    num_bytes=copy.num_bytes,
                    device_ns=self._device.elapsed_ns(copy.begin, copy.end),
                )
            )
        return len(channel.flying) < count

    def _undo(self, action: Load | CopyKv) -> None:
        """A load whose bytes are wrong leaves nothing mapped. Only where checksums are on, so it
        may wait: a step that follows the load may be running."""
        if isinstance(action, Load):
            for lane in self._lanes:
                lane.stream.synchronize()
            at = range(len(action.granules))
            with self._arena_lock:
                self._arena.unmap(action.model, "weights", at, action.granules)

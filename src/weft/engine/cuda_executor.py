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
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from weft.core.actions import (
    CopyKv,
    Drop,
    Interrupt,
    Load,
    MapKv,
    Run,
    StepPlan,
    UnitAction,
    UnmapKv,
    finishes,
)
from weft.core.events import CopyDone, Done, StepDone, UnitEvent
from weft.core.ids import ActionId, ModelName
from weft.core.model import Architecture, ModelSpec
from weft.core.unit import UnitSpec
from weft.engine.base import ImageRef
from weft.engine.book import ActionBook, DependencyFailed, ExecutorClosed, LoadProgress
from weft.engine.checksums import Checksums
from weft.engine.copies import host_tensor, kv_pieces, page_fragments, range_pieces, total_bytes
from weft.engine.cuda_device import CudaDevice, Device, Mark, Stream
from weft.engine.failures import failure
from weft.engine.mapped import check_pages_mapped, check_weights_mapped
from weft.engine.runner import BoundModel, LogitsTap, Runner, Step, bind_model
from weft.kernels.word_sum import word_sum
from weft.memory.base import mapping_difference
from weft.memory.host_registry import HostRegistry
from weft.memory.host_store import HostStore
from weft.models.decoder import Decoder

log = logging.getLogger(__name__)

AHEAD = 2
"""Iterations of a repeated step launched before the first is known: the device never idles."""
MAPPERS = 2
"""Mapping threads: one may wait for a long copy while the other maps."""


@dataclass
class _Channel:
    """A stream, and what was queued on it and has not ended."""

    stream: Stream
    marks: "queue.SimpleQueue[Mark | None]" = field(default_factory=queue.SimpleQueue)
    """For the thread that watches this stream."""

    def record(self) -> Mark:
        """A mark that wakes the worker loop when the device passes it."""
        mark = self.stream.record()
        self.marks.put(mark)
        return mark


@dataclass
class _Copy:
    """A Load or CopyKv on its stream."""

    action: Load | CopyKv
    num_bytes: int
    begin: Mark
    end: Mark
    check: Callable[[], None] | None
    """Compares checksums once the copy has ended; raises ChecksumError."""


@dataclass
class _CopyChannel(_Channel):
    actions: "queue.SimpleQueue[Load | CopyKv | None]" = field(default_factory=queue.SimpleQueue)
    flying: deque[_Copy] = field(default_factory=deque)


@dataclass
class _Running:
    """A Run with iterations on its lane's stream."""

    action: Run
    step: Step
    marks: deque[tuple[Mark, Mark]] = field(default_factory=deque)
    """Begin and end of the iterations in flight."""
    completed: int = 0
    issued: bool = False
    """No further iteration will be launched."""


@dataclass
class _Lane(_Channel):
    runner: Runner = field(kw_only=True)
    ready: deque[Run] = field(default_factory=deque)
    running: list[_Running] = field(default_factory=list)


class CudaExecutor:
    """Implements `engine.base.Executor`.

    threads: torch's threads on the CPU, for what little runs there; None leaves torch's default.
    verify: checksums of parked pages and weight images (promise 1), computed on the device. For
    tests, like fault (called before an action is executed, may raise) and logits_tap (see Runner).
    device: a stand-in for tests; default the current CUDA device.
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
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.unit = unit
        self.checksums = Checksums() if verify else None
        self._device: Device = device or CudaDevice()
        self._arena = self._device.arena(unit)
        self._arena_lock = threading.Lock()
        self._host: torch.Tensor | None = host_tensor(host)
        self._base = self._host.data_ptr()
        self._image_sums: dict[tuple[str, int], int] = {}
        self._fault = fault
        self._models: dict[ModelName, BoundModel] = {}
        self._marks: dict[ActionId, tuple[Stream, Mark]] = {}
        """Where an issued action ends; gone when it has ended."""
        self._mappings: queue.SimpleQueue[MapKv | UnmapKv | Drop | None] = queue.SimpleQueue()
        self._remapped: deque[MapKv | UnmapKv | Drop] = deque()
        """Carried out, not yet ended."""
        self._copies = {
            "device": _CopyChannel(self._device.stream()),
            "host": _CopyChannel(self._device.stream()),
        }
        self._lanes = self._make_lanes(logits_tap)
        self._book = ActionBook(self._dispatch, unit.lanes)
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

    # -- Executor -------------------------------------------------------------------------------

    def bind(self, model: ModelSpec, arch: Architecture, image: ImageRef) -> None:
        self._device.prepare_thread()
        self._registry.want(image.offset, image.num_bytes, first=True)
        first = self._lanes[0].stream
        with self._arena_lock, first.use():
            self._models[model.name] = bind_model(
                self._arena,
                self.unit,
                model,
                arch,
                image,
                partial(Decoder, ops=self._device.ops()),
            )
        made = first.record()
        for lane in self._lanes[1:]:
            lane.stream.wait(made)

    def unbind(self, model: ModelName) -> None:
        if self._book.names_model(model):
            raise ValueError(f"{model}: an action that names it is in flight")
        with self._arena_lock:
            self._arena.release(model)
            del self._models[model]

    def submit(self, action: UnitAction) -> None:
        """Launches at once what is free to run: some milliseconds for a step."""
        self._book.submit(action)
        if isinstance(action, Run):
            self._device.prepare_thread()
            for lane in self._lanes:
                self._launch_ready(lane)

    def poll(self) -> Sequence[UnitEvent]:
        """Ends what the device has passed and launches what became free."""
        self._device.prepare_thread()
        # Taken first: a mark passed after its query makes the descriptor readable once more.
        events = self._book.poll()
        while self._end_passed():
            pass
        for lane in self._lanes:
            self._launch_ready(lane)
        return (*events, *self._book.drain())

    def wait_fd(self) -> int:
        return self._book.wait_fd()

    def check_integrity(self, *, mapped: dict[str, tuple[int, ...]]) -> None:
        """Meaningful only while no action is in flight."""
        with self._arena_lock:
            difference = mapping_difference(self._arena.mapped(), mapped)
        assert difference is None, difference

    def registered_bytes(self) -> int:
        """Bytes of the host store that copies can reach without waiting."""
        return self._registry.registered_bytes()

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

    # -- threads --------------------------------------------------------------------------------

    def _make_lanes(self, logits_tap: LogitsTap | None) -> list[_Lane]:
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
                    logits_tap=logits_tap,
                )
                for _ in streams
            ]
        streams[0].synchronize()
        return [
            _Lane(stream, runner=runner) for stream, runner in zip(streams, runners, strict=True)
        ]

    def _channels(self) -> list[_Channel]:
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

    def _watch(self, channel: _Channel) -> None:
        self._device.prepare_thread()
        while (mark := channel.marks.get()) is not None:
            try:
                mark.synchronize()
            except Exception:
                # The device is lost; the worker loop meets the same error in `poll` and ends.
                log.exception("a wait for the device failed")
            self._book.wake()

    def _copy(self, channel: _CopyChannel) -> None:
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
                self._await(action.after)
                self._remap(action)
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
        self._marks.pop(action, None)
        self._book.end(failure(action, error))

    # -- order ----------------------------------------------------------------------------------

    def _await(self, after: Sequence[ActionId]) -> None:
        """Wait on the host until the device has passed these actions."""
        for other in after:
            if (where := self._marks.get(other)) is not None:
                where[1].synchronize()

    def _queue_behind(self, after: Sequence[ActionId], stream: Stream) -> None:
        """Let `stream` wait for these actions, where they are not on it anyway."""
        for other in after:
            where = self._marks.get(other)
            if where is not None and where[0] is not stream:
                stream.wait(where[1])

    def _end_passed(self) -> bool:
        """End what the device has passed and what was remapped, each after all it followed: a
        thread may know of an end before the worker loop has looked at what came before it."""
        ended = [self._end_copies(channel) for channel in self._copies.values()]
        ended += [self._advance(lane) for lane in self._lanes]
        for _ in range(len(self._remapped)):
            if not self._may_end(self._remapped[0]):
                self._remapped.rotate(-1)
                continue
            self._book.end(Done(action=self._remapped.popleft().id))
            ended.append(True)
        return any(ended)

    def _may_end(self, action: UnitAction) -> bool:
        return not self._book.any_in_flight(action.after)

    # -- memory ---------------------------------------------------------------------------------

    def _remap(self, action: MapKv | UnmapKv | Drop) -> None:
        name = self._model(action.model).spec.name
        with self._arena_lock:
            match action:
                case MapKv():
                    self._arena.map(name, "kv", action.at, action.granules)
                case UnmapKv():
                    self._arena.unmap(name, "kv", action.at, action.granules)
                case Drop():
                    at = range(len(action.granules))
                    self._arena.unmap(name, "weights", at, action.granules)

    # -- copies ---------------------------------------------------------------------------------

    def _issue_load(self, channel: _CopyChannel, action: Load) -> None:
        model, progress = self._model(action.model), self._book.progress(action.id)
        image, at = model.image, range(len(action.granules))
        if len(at) * self.unit.granule_bytes < image.num_bytes:
            raise ValueError(f"{len(at)} granules are too few for {image.num_bytes} bytes")
        self._registry.wait([(image.offset, image.num_bytes)])
        self._await(action.after)
        with self._arena_lock:
            self._arena.map(model.spec.name, "weights", at, action.granules)
        try:
            begin = channel.stream.record()
            sums = self._copy_extents(channel.stream, model, progress)
            check = None if self.checksums is None else partial(self._check_image, model, sums)
            self._issued(channel, _Copy(action, image.num_bytes, begin, channel.record(), check))
        except BaseException:
            progress.fail()
            channel.stream.synchronize()
            with self._arena_lock:
                self._arena.unmap(model.spec.name, "weights", at, action.granules)
            raise

    def _copy_extents(
        self, stream: Stream, model: BoundModel, progress: LoadProgress
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
            if self.checksums is not None:
                if (image.key, i) not in self._image_sums:
                    assert self._host is not None
                    on_host = self._host[begin : begin + extent.num_bytes]
                    self._image_sums[image.key, i] = word_sum(on_host)
                with stream.use():
                    offsets = [extent.offset]
                    sums.append(self._device.sums(model.weights_bytes, offsets, extent.num_bytes))
            progress.advance(stream.record())
        return sums

    def _issue_copy(self, channel: _CopyChannel, action: CopyKv) -> None:
        model, page_bytes = self._model(action.model), self._model(action.model).spec.page_bytes
        pieces = kv_pieces(action.pages, page_bytes, action.extents, self.unit.host_chunk_bytes)
        if any(page >= model.kv.pages.shape[0] for page in action.pages):
            raise ValueError(f"a page id is outside 0 .. {model.kv.pages.shape[0] - 1}")
        if self.checksums is not None:
            self._check_pages(model, action.pages, f"request {action.request}")
        self._registry.wait((extent.offset, extent.num_bytes) for extent in action.extents)
        stream, target = channel.stream, model.kv_bytes.data_ptr()
        self._queue_behind(action.after, stream)
        begin = stream.record()
        for piece in pieces:
            stream.copy(
                action.to,
                target + piece.device_offset,
                self._base + piece.host_offset,
                piece.num_bytes,
            )
        check = None
        if self.checksums is not None and action.pages:
            with stream.use():
                offsets = [page * page_bytes for page in action.pages]
                sums = self._device.sums(model.kv_bytes, offsets, page_bytes)
            check = partial(self._check_kv, action, page_bytes, sums)
        self._issued(channel, _Copy(action, total_bytes(pieces), begin, channel.record(), check))

    def _issued(self, channel: _CopyChannel, copy: _Copy) -> None:
        self._marks[copy.action.id] = (channel.stream, copy.end)
        self._book.issue(copy.action.id)
        channel.flying.append(copy)
        # Its mark may have been passed already, and a step that follows it waits for its marks.
        self._book.wake()

    def _end_copies(self, channel: _CopyChannel) -> bool:
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
            self._marks.pop(copy.action.id, None)
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

    def _check_pages(self, model: BoundModel, pages: Sequence[int], who: str) -> None:
        with self._arena_lock:
            held = self._arena.mapped()[f"{model.spec.name}/kv"]
        check_pages_mapped(model.spec, self.unit.granule_bytes, held, pages, who)

    def _check_step(self, plan: StepPlan, model: BoundModel, *, weights: bool) -> None:
        """The weights and the new pages; the older ones are known to the device only."""
        if weights:
            with self._arena_lock:
                held = self._arena.mapped()[f"{model.spec.name}/weights"]
            check_weights_mapped(model.spec, held)
        for row in plan.rows:
            self._check_pages(model, row.append_pages, f"request {row.request}")

    def _check_image(self, model: BoundModel, sums: list[torch.Tensor]) -> None:
        assert self.checksums is not None
        key = model.image.key
        for i, on_device in enumerate(sums):
            self.checksums.check_image(key, i, int(on_device), self._image_sums[key, i])

    def _check_kv(self, action: CopyKv, page_bytes: int, sums: torch.Tensor) -> None:
        assert self.checksums is not None
        places = page_fragments(len(action.pages), page_bytes, action.extents)
        if action.to == "host":
            self.checksums.parked(action.request, places, sums.tolist())
        else:
            self.checksums.check_resumed(action.request, places, sums.tolist())

    # -- steps ----------------------------------------------------------------------------------

    def _launch_ready(self, lane: _Lane) -> None:
        """Launch steps in order, up to one whose load has not queued all its copies yet."""
        while lane.ready:
            action = lane.ready[0]
            try:
                progress = self._book.following(action)
                model = self._model(action.plan.model)
                if progress is not None and progress.extents < len(model.layout.extents):
                    return
                lane.ready.popleft()
                self._begin(action)
                if self.checksums is not None:
                    self._check_step(action.plan, model, weights=progress is None)
                self._launch(lane, action, model, progress)
            except Exception as error:
                if lane.ready and lane.ready[0] is action:
                    lane.ready.popleft()
                self._fail(action.id, error)

    def _launch(
        self, lane: _Lane, action: Run, model: BoundModel, progress: LoadProgress | None
    ) -> None:
        self._queue_behind(action.after, lane.stream)
        with lane.stream.use():
            step = lane.runner.prepare(model, action.plan)
            running = _Running(action, step)
            follow = None if progress is None else _follows(lane.stream, progress)
            try:
                self._iterate(lane, running, follow)
            except BaseException:
                self._give_up(lane, running)
                raise
        lane.running.append(running)
        self._fill(lane, running)

    def _iterate(
        self, lane: _Lane, running: _Running, follow: Callable[[int], None] | None = None
    ) -> None:
        begin = lane.stream.record()
        lane.runner.iterate(running.step, follow)
        running.marks.append((begin, lane.record()))

    def _fill(self, lane: _Lane, running: _Running) -> None:
        """Launch further iterations of a repeated step, or say that it is issued."""
        if running.issued:
            return
        plan, action = running.action.plan, running.action
        try:
            while not running.issued:
                if running.step.launched == plan.repeat or self._book.interrupted(action.id):
                    self._seal(lane, running)
                elif len(running.marks) >= AHEAD:
                    return
                else:
                    with lane.stream.use():
                        self._iterate(lane, running)
        except Exception as error:
            self._give_up(lane, running)
            lane.running.remove(running)
            self._fail(action.id, error)

    def _seal(self, lane: _Lane, running: _Running) -> None:
        running.issued = True
        action = running.action.id
        if running.marks:
            self._marks[action] = (lane.stream, running.marks[-1][1])
        self._book.issue(action)

    def _give_up(self, lane: _Lane, running: _Running) -> None:
        """A launch failed: the step's buffers are free only when the device is past it."""
        lane.stream.synchronize()
        running.step.release()

    def _advance(self, lane: _Lane) -> bool:
        """Report the iterations the device has passed; whether a Run ended."""
        count = len(lane.running)
        for running in list(lane.running):
            try:
                while running.marks and running.marks[0][1].query():
                    if not self._may_report(running.action):
                        break
                    begin, end = running.marks.popleft()
                    self._complete(lane, running, self._device.elapsed_ns(begin, end))
            except DependencyFailed as error:
                self._give_up(lane, running)
                lane.running.remove(running)
                self._fail(running.action.id, error)
                continue
            self._fill(lane, running)
        return len(lane.running) < count

    def _may_report(self, action: Run) -> bool:
        """Not before what it followed has ended; raises DependencyFailed if its load failed."""
        return self._may_end(action) and self._book.following(action) is None

    def _complete(self, lane: _Lane, running: _Running, device_ns: int) -> None:
        action, step = running.action, running.step
        tokens = step.tokens(running.completed)
        stop = finishes(action.plan, running.completed, tokens)
        running.completed += 1
        if not running.issued and (stop or self._book.interrupted(action.id)):
            self._seal(lane, running)
        last = running.issued and not running.marks
        event = StepDone(
            action=action.id,
            iterations=1,
            last=last,
            tokens=(tokens,),
            token_ns=(time.monotonic_ns(),),
            device_ns=device_ns,
        )
        if not last:
            self._book.report(event)
            return
        step.release()
        lane.running.remove(running)
        self._marks.pop(action.id, None)
        self._book.end(event)

    def _model(self, name: ModelName) -> BoundModel:
        try:
            return self._models[name]
        except KeyError:
            raise ValueError(f"model {name!r} is not bound") from None


def _follows(stream: Stream, progress: LoadProgress) -> Callable[[int], None]:
    """The decoder announces part i (-1: embedding); extent i + 1 of the image holds it."""

    def before_layer(part: int) -> None:
        stream.wait(progress.wait(part + 1))

    return before_layer

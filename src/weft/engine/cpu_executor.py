"""The executor on a CPU: threads that copy, map and compute, in the order `after` allows.

One thread per lane runs steps in order; one copies in (Load, CopyKv to the device), one out (CopyKv
to the host), one maps (MapKv, UnmapKv, Drop). "Device" memory is the CPU arena.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch

from weft.attention.reference import ReferenceAttention
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
from weft.core.events import CopyDone, Done, Failed, StepDone, UnitEvent
from weft.core.ids import ModelName
from weft.core.model import AdapterShape, Architecture, ModelSpec
from weft.core.unit import UnitSpec
from weft.engine.adapters import StepAdapters, bind_adapter
from weft.engine.base import ImageRef
from weft.engine.book import ActionBook, DependencyFailed, ExecutorClosed, LoadProgress
from weft.engine.bound import BoundModels
from weft.engine.checksums import ChecksumError, Checksums, checksum
from weft.engine.copies import (
    copy_pieces,
    host_tensor,
    kv_pieces,
    page_fragments,
    range_pieces,
)
from weft.engine.failures import failure
from weft.engine.mapped import (
    check_adapters_mapped,
    check_pages_mapped,
    check_weights_mapped,
    remap,
)
from weft.engine.model import BoundModel, bind_model
from weft.engine.runner import LogitsTap, Runner
from weft.engine.step import step_done
from weft.memory.arena_cpu import CpuArena
from weft.memory.host_store import HostStore

log = logging.getLogger(__name__)

REPORT_NS = 5_000_000
"""A repeated Run reports what it has drawn at least this often."""


class CpuExecutor:
    """Implements `engine.base.Executor`.

    threads: torch's threads in every step (process-wide); None leaves torch's default.
    verify: checksums of parked pages and weight images (promise 1), and a check before every step
    and copy that all it touches is mapped. For tests.
    poison: see `CpuArena`. fault: called on the worker thread before an action is executed, may
    raise to make it fail. logits_tap: see `Runner`. All three for tests.
    """

    def __init__(
        self,
        unit: UnitSpec,
        host: HostStore,
        *,
        threads: int | None = None,
        verify: bool = False,
        poison: bool = False,
        fault: Callable[[UnitAction], None] | None = None,
        logits_tap: LogitsTap | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.unit = unit
        self.checksums = Checksums() if verify else None
        self._arena = CpuArena(unit.granule_bytes, unit.num_granules, poison=poison)
        self._arena_lock = threading.Lock()
        self._host: torch.Tensor | None = host_tensor(host)
        self._fault = fault
        self._models = BoundModels(self._arena, self._arena_lock, unit.granule_bytes)
        last_token = torch.zeros(unit.num_slots, dtype=torch.int64)
        self._runners = [
            Runner(
                unit,
                torch.device("cpu"),
                ReferenceAttention(),
                last_token,
                adapters=StepAdapters(self._models.adapters),
                logits_tap=logits_tap,
            )
            for _ in range(unit.lanes)
        ]
        names = [*(f"lane-{i}" for i in range(unit.lanes)), "copy-in", "copy-out", "memory"]
        self._queues: dict[str, queue.SimpleQueue[UnitAction | None]] = {
            name: queue.SimpleQueue() for name in names
        }
        self._book = ActionBook(self._dispatch, unit.lanes)
        self._threads = [
            threading.Thread(target=self._work, args=(self._queues[name],), name=f"weft-{name}")
            for name in names
        ]
        for thread in self._threads:
            thread.start()

    # -- Executor -------------------------------------------------------------------------------

    def bind(
        self,
        model: ModelSpec,
        arch: Architecture,
        image: ImageRef,
        adapter: AdapterShape | None = None,
    ) -> None:
        with self._arena_lock:
            if adapter is not None:
                bound = bind_adapter(self._arena, model, arch, adapter, image)
                self._models.adapters[model.name] = bound
                return
            self._models[model.name] = bind_model(self._arena, self.unit, model, arch, image)

    def unbind(self, model: ModelName) -> None:
        self._models.unbind(model, self._book)

    def submit(self, action: UnitAction) -> None:
        self._book.submit(action)

    def progress(self) -> int:
        return self._book.load_parts()

    def poll(self) -> Sequence[UnitEvent]:
        return self._book.poll()

    def wait_fd(self) -> int:
        return self._book.wait_fd()

    def check_integrity(self, *, mapped: dict[str, tuple[int, ...]]) -> None:
        """Meaningful only while no action is in flight."""
        self._models.check_integrity(mapped)

    def close(self) -> None:
        """Finish the iteration or copy at hand, fail the rest, join the threads. Idempotent."""
        self._book.begin_close()
        for waiting in self._queues.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join()
        self._book.end_close()
        self._models.clear()
        self._arena.close()
        self._host = None

    # -- threads --------------------------------------------------------------------------------

    def _dispatch(self, action: UnitAction) -> None:
        match action:
            case Run():
                name = f"lane-{action.lane}"
            case Load():
                name = "copy-in"
            case CopyKv():
                name = "copy-in" if action.to == "device" else "copy-out"
            case _:
                name = "memory"
        self._queues[name].put(action)

    def _work(self, waiting: "queue.SimpleQueue[UnitAction | None]") -> None:
        while (action := waiting.get()) is not None:
            self._book.end(self._execute(action))

    def _execute(self, action: UnitAction) -> StepDone | CopyDone | Done | Failed:
        try:
            if self._book.closing:
                raise ExecutorClosed
            if self._fault is not None:
                self._fault(action)
            match action:
                case Run():
                    return self._run(action)
                case Load():
                    return self._load(action)
                case CopyKv():
                    return self._copy_kv(action)
                case MapKv() | UnmapKv() | Drop():
                    return self._remap(action)
                case Interrupt():
                    raise ValueError("an interrupt is not executed")
        except Exception as error:
            if not isinstance(error, DependencyFailed | ExecutorClosed):
                log.warning("action %d failed", action.id, exc_info=True)
            return failure(action.id, error)

    # -- actions --------------------------------------------------------------------------------

    def _run(self, action: Run) -> StepDone:
        plan = action.plan
        model = self._models[plan.model]
        progress = self._book.following(action)
        runner = self._runners[action.lane]
        step = runner.prepare(model, plan)
        try:
            if self.checksums is not None:
                self._check_step(plan, model, weights=progress is None)
            before_layer = None if progress is None else _waits(progress)
            times_ns: list[int] = []
            first = 0  # iteration of the report at hand
            begin_ns = reported_ns = time.monotonic_ns()
            for i in range(plan.repeat):
                runner.iterate(step, before_layer)
                before_layer = None
                now_ns = time.monotonic_ns()
                times_ns.append(now_ns)
                if finishes(plan, i, step.tokens(i)) or self._book.interrupted(action.id):
                    break
                if now_ns - reported_ns > REPORT_NS and i + 1 < plan.repeat:
                    report = step_done(
                        action,
                        step,
                        range(first, i + 1),
                        last=False,
                        token_ns=times_ns,
                        device_ns=now_ns - begin_ns,
                    )
                    self._book.report(report)
                    times_ns, first = [], i + 1
                    begin_ns = reported_ns = now_ns
            return step_done(
                action,
                step,
                range(first, i + 1),
                last=True,
                token_ns=times_ns,
                device_ns=time.monotonic_ns() - begin_ns,
            )
        finally:
            step.release()

    def _load(self, action: Load) -> CopyDone:
        model, at = self._models.to_load(action)
        progress, host = self._book.progress(action.id), self._host_bytes()
        image, chunk = model.image, self.unit.host_chunk_bytes
        begin_ns, copied = time.monotonic_ns(), 0
        with self._arena_lock:
            self._arena.map(model.spec.name, "weights", at, action.granules)
        try:
            for i, extent in enumerate(model.layout.extents):
                if self._book.closing:
                    raise ExecutorClosed
                pieces = range_pieces(
                    image.offset + extent.offset, extent.offset, extent.num_bytes, chunk
                )
                copied += copy_pieces(pieces, host, model.weights_bytes, "device")
                if self.checksums is not None:
                    begin, end = extent.offset, extent.offset + extent.num_bytes
                    self.checksums.check_image(
                        image.key,
                        i,
                        checksum(model.weights_bytes[begin:end]),
                        checksum(host[image.offset + begin : image.offset + end]),
                    )
                progress.advance()
        except BaseException:
            progress.fail()
            with self._arena_lock:
                self._arena.unmap(model.spec.name, "weights", at, action.granules)
            raise
        return _copy_done(action, copied, begin_ns)

    def _copy_kv(self, action: CopyKv) -> CopyDone:
        model, host = self._models[action.model], self._host_bytes()
        page_bytes = model.spec.page_bytes
        begin_ns = time.monotonic_ns()
        pieces = kv_pieces(action.pages, page_bytes, action.extents, self.unit.host_chunk_bytes)
        if self.checksums is not None:
            self._check_pages(model, action.pages, f"request {action.request}")
        copied = copy_pieces(pieces, host, model.kv_bytes, action.to)
        if self.checksums is not None:
            self._check_kv(self.checksums, action, model, host)
        return _copy_done(action, copied, begin_ns)

    def _remap(self, action: MapKv | UnmapKv | Drop) -> Done:
        with self._arena_lock:
            remap(self._arena, action)
        return Done(action=action.id)

    # -- checks ---------------------------------------------------------------------------------

    def _check_kv(
        self, sums: Checksums, action: CopyKv, model: BoundModel, host: torch.Tensor
    ) -> None:
        page_bytes = model.spec.page_bytes
        places = page_fragments(len(action.pages), page_bytes, action.extents)
        on_device = [
            checksum(model.kv_bytes[page * page_bytes : (page + 1) * page_bytes])
            for page in action.pages
        ]
        on_host = [
            checksum(*(host[e.offset : e.offset + e.num_bytes] for e in place)) for place in places
        ]
        if on_device != on_host:
            raise ChecksumError(f"request {action.request}: a copied KV page differs")
        if action.to == "host":
            sums.parked(action.request, places, on_host)
        else:
            sums.check_resumed(action.request, places, on_device)

    def _check_step(self, plan: StepPlan, model: BoundModel, *, weights: bool) -> None:
        """Every page the step reads or writes, and (unless it follows a load) the weights."""
        if weights:
            with self._arena_lock:
                held = self._arena.mapped()[f"{model.spec.name}/weights"]
            check_weights_mapped(model.spec, held)
        with self._arena_lock:
            check_adapters_mapped(plan, self._arena.mapped())
        for row in plan.rows:
            end = row.start + row.num_tokens + plan.repeat - 1
            pages = model.page_table[row.slot, : -(-end // model.spec.page_tokens)].tolist()
            self._check_pages(model, pages, f"request {row.request}")

    def _check_pages(self, model: BoundModel, pages: Sequence[int], who: str) -> None:
        with self._arena_lock:
            held = self._arena.mapped()[f"{model.spec.name}/kv"]
        check_pages_mapped(model.spec, self.unit.granule_bytes, held, pages, who)

    def _host_bytes(self) -> torch.Tensor:
        assert self._host is not None
        return self._host


def _waits(progress: LoadProgress) -> Callable[[int], None]:
    """The decoder announces part i (-1: embedding); extent i + 1 of the image holds it."""

    def before_layer(part: int) -> None:
        progress.wait(part + 1)

    return before_layer


def _copy_done(action: Load | CopyKv, num_bytes: int, begin_ns: int) -> CopyDone:
    return CopyDone(action=action.id, num_bytes=num_bytes, device_ns=time.monotonic_ns() - begin_ns)

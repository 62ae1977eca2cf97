"""`weft serve` in one process: the hub, the node agent and a frontend in one event loop.

Requests are taken from the first moment and held until their model's image is in the host store
and a worker is up. Workers start while the images are being built.
"""

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from weft.config.pool_config import PoolConfig
from weft.config.values import parse_bytes
from weft.core.errors import WeftError
from weft.hub.base import ModelCard
from weft.hub.hub import PoolHub
from weft.memory.host_store import HostStore
from weft.memory.limits import host_store_bytes, memory_limit_bytes
from weft.node.agent import WORKER_COMMAND, NodeAgent
from weft.node.images import (
    BuildStopped,
    FailedModel,
    ServedModel,
    StorePlan,
    build,
    by_image,
    plan_store,
)
from weft.policy.dispatch.least_loaded import LeastLoaded
from weft.pool.scheduler import PoolScheduler
from weft.pool.units import Limits
from weft.server.app import create_app
from weft.server.binding import check_bind
from weft.server.serve import listen, serve
from weft.transport.messages import BindModel, WorkerConfig

log = logging.getLogger("weft.node")

BUILD_THREADS = min(8, os.cpu_count() or 1)


def run_pool(
    config: PoolConfig,
    base_dir: Path,
    *,
    insecure: bool = False,
    trace_dir: Path | None = None,
    on_ready: Callable[[str], None] | None = None,
    check: bool = False,
    worker_command: Sequence[str] = WORKER_COMMAND,
) -> None:
    """Serve until SIGTERM or SIGINT. Must run in the main thread: workers die with the thread
    that started them.

    `base_dir` is where the models' relative paths start. `on_ready` gets the URL once connections
    are taken. `check` has the workers verify checksums and ledgers (for tests). Raises WeftError
    when nothing can be served at all.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    pool = _Pool(config, base_dir, trace_dir, check, worker_command)
    asyncio.run(pool.run(insecure=insecure, on_ready=on_ready))


class _Pool:
    def __init__(
        self,
        config: PoolConfig,
        base_dir: Path,
        trace_dir: Path | None,
        check: bool,
        worker_command: Sequence[str],
    ) -> None:
        self._config = config
        self._base_dir = base_dir
        self._trace_dir = trace_dir
        self._check = check
        self._worker_command = worker_command
        self._stop_building = threading.Event()

    async def run(self, *, insecure: bool, on_ready: Callable[[str], None] | None) -> None:
        server = self._config.server
        # First of all: a port that is taken, or may not be served, costs no start of workers.
        check_bind(server.host, insecure=insecure, has_keys=bool(server.keys))
        with listen(server.host, server.port) as sock:
            await self._run(sock, insecure=insecure, on_ready=on_ready)

    async def _run(
        self, sock: socket.socket, *, insecure: bool, on_ready: Callable[[str], None] | None
    ) -> None:
        server = self._config.server
        asked = self._config.engine.host_memory
        budget = host_store_bytes(parse_bytes(asked) if asked else None, memory_limit_bytes())
        plan = await asyncio.to_thread(plan_store, self._config, self._base_dir, budget)
        if not plan.models:
            raise WeftError(f"no model can be served: {plan.failed[0].reason}")
        host = HostStore.create(plan.store_bytes)
        agent = NodeAgent(host, [self._unit(0, plan)], command=self._worker_command)
        limits = Limits(max_queue=server.max_queue, max_model_queue=server.max_model_queue)
        scheduler = PoolScheduler(LeastLoaded(), limits)
        hub = PoolHub(scheduler, agent, hold_s=server.hold_s)
        agent.connect(hub)
        _add_models(hub, plan)
        app = create_app(hub, self._config, base_dir=self._base_dir)
        hub.add_unit(0)
        building = asyncio.create_task(self._build_images(plan, host, hub))
        stop = asyncio.Event()
        refusals: list[str] = []

        def refuse(reason: str) -> None:
            refusals.append(reason)
            stop.set()

        agent.on_refused = refuse
        building.add_done_callback(lambda done: _report(done, refuse))
        try:
            await serve(
                app,
                server.host,
                server.port,
                insecure=insecure,
                on_ready=on_ready,
                stop=stop,
                sock=sock,
            )
        finally:
            self._stop_building.set()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([building])
            hub.close()
            await agent.close()
            log.info("stopped")
        if refusals:
            raise WeftError(refusals[0])

    def _unit(self, unit: int, plan: StorePlan) -> WorkerConfig:
        """The configuration of the workers of one unit. One unit has all of the parked KV."""
        engine = self._config.engine
        memory = engine.device_memory
        return WorkerConfig(
            unit=unit,
            incarnation=0,
            device=engine.device,
            device_memory_bytes=parse_bytes(memory) if memory else None,
            host_store_bytes=plan.store_bytes,
            host_offset=plan.parked_offset,
            host_bytes=plan.parked_bytes,
            depth=engine.depth,
            max_rows=engine.max_rows,
            max_step_tokens=engine.max_step_tokens,
            max_repeat=engine.max_repeat,
            prefix_cache=engine.prefix_cache,
            cpu_threads=engine.cpu_threads,
            policy=self._config.policy,
            turn_s=self._config.turn_s,
            trace_dir=str(self._trace_dir) if self._trace_dir is not None else None,
            check=self._check,
        )

    async def _build_images(self, plan: StorePlan, host: HostStore, hub: PoolHub) -> None:
        """One after the other, each with several threads; the event loop stays live."""
        loop = asyncio.get_running_loop()

        def progress(_: int) -> None:
            if self._stop_building.is_set():
                raise BuildStopped
            loop.call_soon_threadsafe(hub.note_progress)

        for group in by_image(plan.models):
            first = group[0]
            begin_s = time.monotonic()
            try:
                reason = await asyncio.to_thread(build, first, host, progress, BUILD_THREADS)
            except BuildStopped:
                return
            for model in group:
                name = model.config.name
                if reason is None:
                    seconds = time.monotonic() - begin_s
                    size = model.image.num_bytes / 1e6
                    log.info("model=%s is ready image_mb=%.1f build_s=%.2f", name, size, seconds)
                    hub.model_ready(name)
                else:
                    log.error("model=%s failed: %s", name, reason)
                    hub.model_failed(name, reason)


def _report(building: "asyncio.Task[None]", refuse: Callable[[str], None]) -> None:
    """A bug while images are built would leave requests waiting for ever: better an end that is
    seen."""
    error = None if building.cancelled() else building.exception()
    if error is not None:
        log.error("building weight images failed", exc_info=error)
        refuse(f"weight images cannot be built: {type(error).__name__}: {error}")


def _add_models(hub: PoolHub, plan: StorePlan) -> None:
    now_s = int(time.time())
    for model in plan.models:
        image = msgspec.structs.replace(model.image, tokenizer=str(model.path / "tokenizer.json"))
        bind = BindModel(model=model.spec, arch=model.arch, image=image)
        hub.add_model(_card(model, now_s), bind)
    for failed in plan.failed:
        log.error("model=%s failed: %s", failed.config.name, failed.reason)
        hub.add_failed_model(_failed_card(failed, now_s))


def _card(model: ServedModel, now_s: int) -> ModelCard:
    spec = model.spec
    return ModelCard(
        name=spec.name,
        path=str(model.path),
        created_s=now_s,
        max_context_tokens=spec.max_context_tokens,
        vocab_size=spec.vocab_size,
        eos_ids=spec.eos_ids,
        ttft_slo_s=spec.ttft_slo_s,
        tbt_slo_s=spec.tbt_slo_s,
    )


def _failed_card(model: FailedModel, now_s: int) -> ModelCard:
    return ModelCard(
        name=model.config.name,
        path=str(model.path),
        created_s=now_s,
        max_context_tokens=0,
        vocab_size=0,
        eos_ids=(),
        ttft_slo_s=model.config.ttft_slo_s or 0.0,
        tbt_slo_s=model.config.tbt_slo_s or 0.0,
        failed=model.reason,
    )

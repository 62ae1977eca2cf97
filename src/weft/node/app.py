"""`weft serve` in one process: the hub, the node agent and a frontend in one event loop.

Requests are taken from the first moment and held until their model's image is in the host store
and a worker is up. Workers start while the images are being built.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from weft import logs
from weft.config.pool_config import PoolConfig
from weft.config.values import parse_bytes
from weft.core.errors import WeftError
from weft.hub.hub import PoolHub
from weft.memory.host_store import HostStore
from weft.memory.limits import host_store_bytes, memory_limit_bytes
from weft.node.agent import WORKER_COMMAND, NodeAgent
from weft.node.catalog import Catalog
from weft.node.images import StorePlan, plan_store
from weft.node.operator import PoolOperator, Reload
from weft.node.reloads import reloads
from weft.policy.dispatch.least_loaded import LeastLoaded
from weft.pool.scheduler import PoolScheduler
from weft.pool.units import Limits
from weft.server.admin import create_admin_app, serve_admin
from weft.server.admin_socket import default_socket
from weft.server.app import create_app
from weft.server.binding import check_bind
from weft.server.keys import KeyRing
from weft.server.serve import listen, serve, url_of
from weft.transport.messages import WorkerConfig

log = logging.getLogger("weft.node")


def run_pool(
    config: PoolConfig,
    base_dir: Path,
    *,
    insecure: bool = False,
    trace_dir: Path | None = None,
    on_ready: Callable[[str], None] | None = None,
    check: bool = False,
    worker_command: Sequence[str] = WORKER_COMMAND,
    reload: Reload | None = None,
    config_file: Path | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. Must run in the main thread: workers die with the thread
    that started them.

    `base_dir` is where the models' relative paths start. `on_ready` gets the URL once connections
    are taken. `reload` reads the configuration again, `config_file` is what it reads. `check` has
    the workers verify checksums and ledgers (for tests). Raises WeftError
    when nothing can be served at all.
    """
    logs.configure()
    pool = _Pool(config, base_dir, trace_dir, check, worker_command, reload, config_file)
    asyncio.run(pool.run(insecure=insecure, on_ready=on_ready))


class _Pool:
    def __init__(
        self,
        config: PoolConfig,
        base_dir: Path,
        trace_dir: Path | None,
        check: bool,
        worker_command: Sequence[str],
        reload: Reload | None,
        config_file: Path | None,
    ) -> None:
        self._config = config
        self._base_dir = base_dir
        self._trace_dir = trace_dir
        self._check = check
        self._worker_command = worker_command
        self._reload = reload
        self._config_file = config_file

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
        plan = await asyncio.to_thread(
            partial(plan_store, spare_bytes=self._spare_bytes()),
            self._config,
            self._base_dir,
            budget,
        )
        if not plan.models:
            raise WeftError(f"no model can be served: {plan.failed[0].reason}")
        host = HostStore.create(plan.store_bytes)
        agent = NodeAgent(host, [self._unit(0, plan)], command=self._worker_command)
        limits = Limits(max_queue=server.max_queue, max_model_queue=server.max_model_queue)
        scheduler = PoolScheduler(LeastLoaded(), limits)
        hub = PoolHub(scheduler, agent, hold_s=server.hold_s)
        agent.connect(hub)
        catalog = Catalog(self._config, self._base_dir, plan, host, hub)
        app = create_app(hub, self._config, base_dir=self._base_dir)
        if self._reload is not None:
            self._reload = with_keys(self._reload, app.state, server.host, insecure=insecure)
        hub.add_unit(0)
        building = asyncio.create_task(catalog.run_builds())
        stop = asyncio.Event()
        refusals: list[str] = []

        def refuse(reason: str) -> None:
            refusals.append(reason)
            stop.set()

        agent.on_refused = refuse
        building.add_done_callback(lambda done: _report(done, refuse))
        try:
            await self._serve(sock, app, hub, catalog, insecure, on_ready, stop)
        finally:
            catalog.stop_building()
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

    def _spare_bytes(self) -> int | None:
        """Kept for images of models that come later; none where no model can."""
        asked = self._config.engine.spare_host_memory
        if asked is not None:
            return parse_bytes(asked)
        return None if self._reload is not None or self._config.admin.model_roots else 0

    async def _serve(
        self,
        sock: socket.socket,
        app: Any,
        hub: PoolHub,
        catalog: Catalog,
        insecure: bool,
        on_ready: Callable[[str], None] | None,
        stop: asyncio.Event,
    ) -> None:
        """The public server, and beside it, once it has its port, the admin plane."""
        server = self._config.server
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        public = asyncio.create_task(
            serve(
                app,
                server.host,
                server.port,
                insecure=insecure,
                on_ready=ready.set_result,
                stop=stop,
                sock=sock,
            )
        )
        waits: set[asyncio.Future[Any]] = {public, ready}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            await public
            return
        try:
            async with self._admin(hub, catalog, ready.result(), stop.set):
                if on_ready is not None:
                    on_ready(ready.result())
                await asyncio.wait({public})
        finally:
            stop.set()
            await public

    @asynccontextmanager
    async def _admin(
        self, hub: PoolHub, catalog: Catalog, url: str, stop: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Commands on a private socket. SIGHUP and a changed file reload as a command would."""
        admin, port = self._config.admin, int(url.rpartition(":")[2])
        path = self._base_dir / admin.socket if admin.socket else default_socket(port)
        operator = PoolOperator(hub, catalog, self._base_dir, reload=self._reload, stop=stop)
        tcp = None
        if admin.port is not None:
            tcp = listen(self._config.server.host, admin.port)
            log.info("admin=serving url=%s", url_of(tcp))
        app = create_admin_app(operator)
        async with (
            serve_admin(app, path, tcp, admin.key_sha256),
            reloads(operator, self._config_file),
        ):
            yield


def with_keys(reload: Reload, state: Any, host: str, *, insecure: bool) -> Reload:
    """`reload` that also exchanges the API keys, `state.keys`. It raises WeftError, and leaves
    them, when one cannot be read, or the last one would go where strangers reach the port."""

    def reloaded() -> tuple[PoolConfig, Path]:
        config, base_dir = reload()
        keys = KeyRing.load(config.server.keys, base_dir, before=state.keys)
        check_bind(host, insecure=insecure, has_keys=len(keys) > 0)
        state.keys = keys
        return config, base_dir

    return reloaded


def _report(building: "asyncio.Task[None]", refuse: Callable[[str], None]) -> None:
    """A bug while images are built would leave requests waiting for ever: better an end that is
    seen."""
    error = None if building.cancelled() else building.exception()
    if error is not None:
        log.error("building weight images failed", exc_info=error)
        refuse(f"weight images cannot be built: {type(error).__name__}: {error}")

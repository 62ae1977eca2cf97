"""The node agent's half of the workers' lives: starts, watches, kills. It owns the host store.

A worker is lost when its process has exited and everything it ever said was heard; only then does
the hub learn of it, and only then is the next incarnation started. So no two workers ever write
the same region of the host store, and the hub's view of it is exact.
"""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from weft.memory.host_store import HostStore
from weft.transport.channel import END_OF_STREAM, HubChannel
from weft.transport.messages import (
    Configure,
    Hello,
    HubMessage,
    Shutdown,
    WorkerConfig,
    WorkerFailed,
    WorkerMessage,
)

log = logging.getLogger("weft.node")

WORKER_COMMAND = (sys.executable, "-m", "weft.worker")
START_TIMEOUT_S = 600.0
"""A worker that has not said Hello by then is killed."""
STOP_GRACE_S = 3.0


class HubSide(Protocol):
    """Who is told: `weft.hub.hub.PoolHub`."""

    def unit_messages(self, unit: int, messages: list[WorkerMessage]) -> None: ...

    def unit_lost(self, unit: int, incarnation: int, cause: str) -> None: ...


class _Worker:
    """One process and our end of its socket."""

    def __init__(
        self, config: WorkerConfig, process: subprocess.Popen[bytes], agent: "NodeAgent"
    ) -> None:
        self.config = config
        self.process = process
        self.channel: HubChannel | None = None
        self.reason: str | None = None
        self.exited = asyncio.Event()
        self.agent = agent
        self.start_timer: asyncio.TimerHandle | None = None

    @property
    def label(self) -> str:
        return f"{self.config.unit}.{self.config.incarnation}"

    def kill(self) -> None:
        """Does nothing to a process that has ended."""
        self.process.kill()

    def on_messages(self, messages: list[WorkerMessage]) -> None:
        for message in messages:
            match message:
                case Hello(device=device):
                    self.stop_timer()
                    self.agent.was_up = True
                    log.info(
                        "unit=%s state=up pid=%d device=%s",
                        self.label,
                        self.process.pid,
                        device.replace(" ", "-"),
                    )
                case WorkerFailed(reason=reason, refused=refused):
                    self.reason = reason
                    if refused and not self.agent.was_up and self.agent.on_refused is not None:
                        self.agent.on_refused(reason)
        self.agent.hub.unit_messages(self.config.unit, messages)

    def on_end(self, reason: str) -> None:
        """It hung up. It is about to exit and say by its status why, or it is out of its mind."""
        if reason == END_OF_STREAM:
            asyncio.get_running_loop().call_later(STOP_GRACE_S, self.kill)
        else:
            self.reason = self.reason or reason
            self.kill()

    def stop_timer(self) -> None:
        if self.start_timer is not None:
            self.start_timer.cancel()
            self.start_timer = None


class NodeAgent:
    """Implements `weft.hub.hub.Launcher`. In the event loop's thread, except the waiting."""

    def __init__(
        self,
        host: HostStore,
        units: Sequence[WorkerConfig],
        *,
        command: Sequence[str] = WORKER_COMMAND,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        """`units`: the configuration of each unit's workers; the incarnation is filled in."""
        self._host = host
        self._configs = {config.unit: config for config in units}
        self._command = tuple(command)
        self._start_timeout_s = start_timeout_s
        self._workers: dict[tuple[int, int], _Worker] = {}
        self._closing = False
        self.hub: HubSide
        self.was_up = False
        """Some worker said Hello, so the configuration works here."""
        self.on_refused: Callable[[str], None] | None = None
        """Told why the first workers refuse their configuration."""

    def connect(self, hub: HubSide) -> None:
        """Before the first `start`."""
        self.hub = hub

    def start(self, unit: int, incarnation: int) -> None:
        if self._closing:
            return
        loop = asyncio.get_running_loop()
        config = msgspec.structs.replace(self._configs[unit], incarnation=incarnation)
        label = f"{unit}.{incarnation}"
        ours: socket.socket | None = None
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                process = self._spawn(label, theirs.fileno())
        except OSError as error:  # also where the server has no descriptor left for the sockets
            if ours is not None:
                ours.close()
            loop.call_soon(self.hub.unit_lost, unit, incarnation, f"cannot start a worker: {error}")
            return
        log.info("unit=%s state=starting pid=%d", label, process.pid)
        worker = self._workers[unit, incarnation] = _Worker(config, process, self)
        worker.channel = HubChannel(ours, worker.on_messages, worker.on_end)
        worker.channel.send(Configure(config=config))
        worker.start_timer = loop.call_later(self._start_timeout_s, self._too_slow, worker)
        threading.Thread(target=self._wait, args=(worker, loop), daemon=True).start()

    def _spawn(self, label: str, socket_fd: int) -> subprocess.Popen[bytes]:
        # The kernel kills the worker when the thread that forked it ends (PR_SET_PDEATHSIG):
        # `start` must run in a thread that lives as long as the server.
        command = [*self._command, "--label", f"unit{label}", "--socket-fd", str(socket_fd)]
        command += ["--host-fd", str(self._host.fd), "--parent", str(os.getpid())]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=(socket_fd, self._host.fd)
        )

    def _wait(self, worker: _Worker, loop: asyncio.AbstractEventLoop) -> None:
        worker.process.wait()
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is interested
            loop.call_soon_threadsafe(self._lost, worker)

    def _lost(self, worker: _Worker) -> None:
        """The process is gone: hear what it left in the socket, then tell."""
        worker.stop_timer()
        if worker.channel is not None:
            worker.channel.finish()
        config = worker.config
        del self._workers[config.unit, config.incarnation]
        worker.exited.set()
        cause = worker.reason or _exit_text(worker.process.returncode)
        if not self._closing:
            log.warning("unit=%s state=lost reason=%s", worker.label, cause)
            self.hub.unit_lost(config.unit, config.incarnation, cause)

    def _too_slow(self, worker: _Worker) -> None:
        worker.reason = f"the worker did not start within {self._start_timeout_s:.0f} s"
        worker.kill()

    def stop(self, unit: int, incarnation: int) -> None:
        worker = self._workers.get((unit, incarnation))
        if worker is not None:
            worker.reason = worker.reason or "the worker fell silent"
            worker.kill()

    def send(self, unit: int, incarnation: int, message: HubMessage) -> None:
        worker = self._workers.get((unit, incarnation))
        if worker is not None and worker.channel is not None:
            worker.channel.send(message)

    def host_usage(self) -> tuple[int, int]:
        return self._host.num_bytes, self._host.resident_bytes()

    def pids(self) -> tuple[int, ...]:
        """Of the workers that run now."""
        return tuple(worker.process.pid for worker in self._workers.values())

    async def close(self) -> None:
        """Ask the workers to free their devices and exit; kill those that do not, and at once those
        that are still starting."""
        self._closing = True
        workers = list(self._workers.values())
        for worker in workers:
            if worker.start_timer is not None:
                worker.kill()
            elif worker.channel is not None:
                worker.channel.send(Shutdown())
        for worker in workers:
            try:
                await asyncio.wait_for(worker.exited.wait(), STOP_GRACE_S)
            except TimeoutError:
                worker.kill()
                await worker.exited.wait()


def _exit_text(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exited with status {status}"

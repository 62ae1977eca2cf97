"""A worker process: from its command line to the loop.

    python -m weft.worker --label unit0.1 --socket-fd 5 --host-fd 6 --parent 4711

It inherits one end of a socket pair and the host store's memfd, reads its configuration from the
socket, builds the arena, says Hello and runs. It dies with its parent, whatever happens to that.
"""

import argparse
import ctypes
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from weft import logs
from weft.core.errors import WeftError
from weft.core.request import Extent
from weft.core.unit import UnitSpec
from weft.engine.base import Executor
from weft.memory.host_store import HostStore
from weft.transport.channel import ChannelClosed, WorkerChannel
from weft.transport.messages import Configure, Hello, Shutdown, WorkerConfig, WorkerFailed
from weft.worker.loop import Scheduler, Worker
from weft.worker.trace import Recorder

log = logging.getLogger("weft.worker")

_PR_SET_PDEATHSIG = 1


class BuiltUnit(NamedTuple):
    """The two halves of a unit, made from the same UnitSpec."""

    device: str
    spec: UnitSpec
    scheduler: Scheduler
    executor: Executor
    forget_parked: Callable[[Sequence[Extent]], None] | None = None
    """None where the host store is registered with the device."""


Build = Callable[[WorkerConfig, HostStore], BuiltUnit]


def build_unit(config: WorkerConfig, host: HostStore) -> BuiltUnit:
    """Probe the device and make scheduler and executor for it. Raises WeftError if the device
    cannot be had."""
    # Imported here: torch takes seconds, and a worker that has lost its parent by then is gone.
    from weft.engine.device import probe
    from weft.policy.presets import preset
    from weft.sched.scheduler import UnitScheduler

    facts = probe(config.device, config.device_memory_bytes)
    spec = UnitSpec(
        granule_bytes=facts.granule_bytes,
        num_granules=facts.arena_bytes // facts.granule_bytes,
        host_offset=config.host_offset,
        host_bytes=config.host_bytes,
        depth=config.depth,
        # Models that are resident together hold slots at the same time.
        num_slots=max(256, 4 * config.max_rows),
        max_rows=config.max_rows,
        max_step_tokens=config.max_step_tokens,
        max_repeat=config.max_repeat,
        prefix_cache=config.prefix_cache,
    )
    # First what may refuse its arguments: an executor that nobody gets is closed by nobody.
    scheduler = UnitScheduler(spec, preset(config.policy, turn_s=config.turn_s))
    executor: Executor
    if facts.kind == "cuda":
        from weft.engine.cuda_executor import CudaExecutor

        executor = CudaExecutor(spec, host, threads=config.cpu_threads, verify=config.check)
        return BuiltUnit(facts.name, spec, scheduler, executor)
    from weft.engine.cpu_executor import CpuExecutor

    executor = CpuExecutor(spec, host, threads=config.cpu_threads, verify=config.check)
    # On CUDA the region is registered, and what is registered must not be punched.
    forget = partial(_punch, host)
    return BuiltUnit(facts.name, spec, scheduler, executor, forget)


def _punch(host: HostStore, extents: Sequence[Extent]) -> None:
    for extent in extents:
        host.punch(extent.offset, extent.num_bytes)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill us when the parent dies; exit at once if it already has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit(1)


def main(argv: Sequence[str] | None = None, *, build: Build = build_unit) -> int:
    """Run a worker to its end. Returns the exit status: 0 when told to stop or when the hub is
    gone, 1 when it failed (the hub was told why)."""
    parser = argparse.ArgumentParser(prog="weft.worker", description="started by weft serve")
    parser.add_argument("--label", required=True, help="for people: unit and incarnation")
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--host-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args(argv)
    die_with_parent(args.parent)
    # Ctrl-C goes to the whole foreground group; it is the server's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure(label=args.label)
    channel = WorkerChannel(socket.socket(fileno=args.socket_fd))
    try:
        first, *others = channel.receive(None)
        if any(isinstance(message, Shutdown) for message in (first, *others)):
            return 0
        # Nothing else comes before the hub has heard our Hello.
        assert isinstance(first, Configure) and not others
        return _serve(first.config, channel, args.host_fd, build)
    except ChannelClosed:
        return 0


def _serve(config: WorkerConfig, channel: WorkerChannel, host_fd: int, build: Build) -> int:
    executor: Executor | None = None
    try:
        host = HostStore.attach(host_fd, config.host_store_bytes)
        built = build(config, host)
        executor = built.executor
        recorder = None
        if config.trace_dir is not None:
            recorder = Recorder(
                Path(config.trace_dir), config.unit, config.incarnation, built.device
            )
        channel.send(
            Hello(
                incarnation=config.incarnation,
                device=built.device,
                spec=built.spec,
                pins_host=built.forget_parked is None,
            )
        )
        worker = Worker(
            config.incarnation,
            channel,
            built.scheduler,
            executor,
            recorder=recorder,
            check=config.check,
            forget_parked=built.forget_parked,
        )
        worker.run()
        return 0
    except ChannelClosed:
        raise
    except WeftError as error:
        channel.send(WorkerFailed(incarnation=config.incarnation, reason=str(error), refused=True))
        return 1
    except Exception as error:
        log.exception("worker failed")
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        channel.send(WorkerFailed(incarnation=config.incarnation, reason=reason))
        return 1
    finally:
        if executor is not None:
            executor.close()

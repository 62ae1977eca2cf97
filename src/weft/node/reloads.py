"""Reloads that nobody typed: SIGHUP, and a configuration file that changed."""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from weft.core.errors import WeftError
from weft.node.operator import PoolOperator

log = logging.getLogger("weft.node")

LOOK_EVERY_S = 1.0

Stamp = tuple[int, int, int] | None


@contextlib.asynccontextmanager
async def reloads(operator: PoolOperator, file: Path | None) -> AsyncIterator[None]:
    """SIGHUP reloads (in the main thread), and so does a change of `file`, looked at once a second
    while the configuration says `watch: true`."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = loop.create_task(_reload(operator))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    main = threading.current_thread() is threading.main_thread()
    if main and operator.can_reload:
        loop.add_signal_handler(signal.SIGHUP, reload)
    if file is not None and operator.can_reload:
        tasks.add(loop.create_task(_watch(operator, file)))
    try:
        yield
    finally:
        if main and operator.can_reload:
            loop.remove_signal_handler(signal.SIGHUP)
        for task in list(tasks):
            task.cancel()


async def _watch(operator: PoolOperator, file: Path) -> None:
    seen = _stamp(file)
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        stamp = _stamp(file)
        if stamp is not None and stamp != seen and operator.watches:
            seen = stamp
            await _reload(operator)


async def _reload(operator: PoolOperator) -> None:
    try:
        await operator.reload()
    except WeftError as error:
        log.error("reload=refused nothing changed: %s", " ".join(str(error).split()))
    except Exception:  # the file is watched on: the next change may mend it
        log.exception("reload=failed")


def _stamp(file: Path) -> Stamp:
    """Changes when the file does, also when another takes its place; None while there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns

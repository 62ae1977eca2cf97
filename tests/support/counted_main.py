"""As `pool_main`, and SIGUSR1 prints what the process holds as one line of JSON."""

import asyncio
import gc
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from weft.config.pool_config import parse_pool_config
from weft.node.app import run_pool


def count() -> str:
    gc.collect()
    tasks = Counter(task.get_coro().__qualname__ for task in asyncio.all_tasks())
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return json.dumps(
        {
            "tasks": tasks,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "resident_bytes": resident,
        }
    )


def main() -> None:
    file, base_dir, check, trace_dir = sys.argv[1:]

    def on_ready(url: str) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lambda: print(count(), flush=True))
        print(url, flush=True)

    run_pool(
        parse_pool_config(Path(file).read_text(), source=file),
        Path(base_dir),
        check=check == "check",
        trace_dir=None if trace_dir == "-" else Path(trace_dir),
        on_ready=on_ready,
    )


if __name__ == "__main__":
    main()

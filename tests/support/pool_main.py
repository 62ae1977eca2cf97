"""The process that `PoolProcess` starts: a pool with the workers' checks switched on.

argv: configuration file, folder of its relative paths, "check" or "plain", and the trace folder or
"-". Prints the URL when it takes connections.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from weft.config.pool_config import PoolConfig, parse_pool_config
from weft.node.app import run_pool


def main(argv: Sequence[str]) -> None:
    """Run a pool to its end."""
    file, base_dir, check, trace_dir = argv

    def read() -> tuple[PoolConfig, Path]:
        return parse_pool_config(Path(file).read_text(), source=file), Path(base_dir)

    run_pool(
        read()[0],
        Path(base_dir),
        check=check == "check",
        trace_dir=None if trace_dir == "-" else Path(trace_dir),
        on_ready=lambda url: print(url, flush=True),
        reload=read,
        config_file=Path(file),
    )


if __name__ == "__main__":
    main(sys.argv[1:])

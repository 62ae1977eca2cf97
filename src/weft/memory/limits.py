"""How much memory this machine lends us: the smaller of what it has and what the cgroup allows."""

from collections.abc import Iterator
from pathlib import Path

from weft.core.errors import WeftError

HEADROOM = 0.10
"""Share of the memory that the host store never takes, whatever is asked."""
DEFAULT_SHARE = 0.5


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Memory of the machine, or of the tightest cgroup (v1 or v2) this process is in."""
    limits = [_total_bytes(root), *_cgroup_limits(root)]
    return min(limits)


def host_store_bytes(asked_bytes: int | None, limit_bytes: int) -> int:
    """The size of the host store: what was asked, else half of the limit. Raises WeftError if it
    would not leave the headroom."""
    largest = int(limit_bytes * (1 - HEADROOM))
    if asked_bytes is None:
        return int(limit_bytes * DEFAULT_SHARE)
    if asked_bytes > largest:
        raise WeftError(
            f"engine.host_memory asks for {asked_bytes >> 20} MiB; this machine or its cgroup has "
            f"{limit_bytes >> 20} MiB, so ask for at most {largest >> 20}M"
        )
    return asked_bytes


def _total_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise WeftError("/proc/meminfo does not say MemTotal; set engine.host_memory")


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Limits of this process's memory cgroups and all their parents; missing files mean none."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = base / path.strip("/")
        # Inside a container the path may name a place outside our mount: its root is ours then.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            yield from _number(folder / name)


def _number(file: Path) -> Iterator[int]:
    try:
        text = file.read_text().strip()
    except OSError:
        return
    if text.isdigit():
        yield int(text)

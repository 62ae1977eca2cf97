"""`weft doctor`: what this machine has for weft, line by line, with the remedy where it lacks."""

import importlib.metadata
import json
import mmap
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.text import Text

from weft.core.errors import WeftError

Level = Literal["ok", "warn", "fail"]

MIN_MEMORY_BYTES = 2 << 30
MIN_DISK_BYTES = 2 << 30
MIN_FILES = 4096
PROBE_TIMEOUT_S = 120
COLORS: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "red"}

TORCH_PROBE = """
import json, sys
found = {}
import torch
found["torch"] = torch.__version__
found["cuda"] = torch.cuda.is_available()
if found["cuda"]:
    free, total = torch.cuda.mem_get_info()
    found["name"] = torch.cuda.get_device_name()
    found["capability"] = list(torch.cuda.get_device_capability())
    found["free"], found["total"] = free, total
json.dump(found, sys.stdout)
"""
"""Runs in a process of its own: a broken driver is then a line of the report."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    level: Level
    name: str
    text: str
    remedy: str | None = None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"


def check_python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding(
        level="ok" if good else "fail",
        name="python",
        text=version,
        remedy=None if good else "install Python 3.11 or newer",
    )


def check_cores() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    few = cores < 2
    yield Finding(
        level="warn" if few else "ok",
        name="cores",
        text=str(cores),
        remedy="give it two: the server and the worker share one otherwise" if few else None,
    )


def check_memory() -> Iterator[Finding]:
    from weft.memory.limits import memory_limit_bytes

    limit = memory_limit_bytes()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{_gib(machine)}" + (f", cgroup limit {_gib(limit)}" if limit < machine else "")
    small = limit < MIN_MEMORY_BYTES
    yield Finding(
        level="warn" if small else "ok",
        name="memory",
        text=text,
        remedy="weight images live in host memory; raise the limit" if small else None,
    )


def check_memfd() -> Iterator[Finding]:
    try:
        fd = os.memfd_create("weft-doctor", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, 1 << 20)
            with mmap.mmap(fd, 1 << 20) as view:
                view[:4] = b"weft"
                good = os.pread(fd, 4, 0) == b"weft"
        finally:
            os.close(fd)
    except OSError as error:
        good, text = False, str(error)
    else:
        text = "works; /dev/shm is not used, its size does not matter"
    yield Finding(
        level="ok" if good else "fail",
        name="memfd",
        text=text,
        remedy=None if good else "allow memfd_create in this container (seccomp profile)",
    )


def check_torch() -> Iterator[Finding]:
    facts, problem = probe_torch()
    if facts is None:
        yield Finding(
            level="fail", name="torch", text=problem, remedy="reinstall torch: pip install torch"
        )
        return
    yield Finding(level="ok", name="torch", text=str(facts["torch"]))
    if not facts["cuda"]:
        yield Finding(level="ok", name="device", text="cpu (torch sees no CUDA device)")
        return
    free, total = int(facts["free"]), int(facts["total"])
    crowded = free < 0.8 * total
    major, minor = facts["capability"]
    yield Finding(
        level="warn" if crowded else "ok",
        name="device",
        text=f"cuda: {facts['name']} (sm_{major}{minor}), {_gib(free)} of {_gib(total)} free",
        remedy="other processes hold memory there; stop them or set --device-memory"
        if crowded
        else None,
    )
    yield from _check_cuda_extras()


def probe_torch() -> tuple[dict[str, Any] | None, str]:
    """What torch says of itself in a process of its own, or why it could not say it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH_PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"did not answer within {PROBE_TIMEOUT_S} s"
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"died with {done.returncode}"]
        return None, last[0][:200]
    facts = json.loads(done.stdout)
    return (facts, "") if isinstance(facts, dict) else (None, "said nothing useful")


def _check_cuda_extras() -> Iterator[Finding]:
    for package in ("triton", "cuda-bindings"):
        try:
            text, missing = importlib.metadata.version(package), False
        except importlib.metadata.PackageNotFoundError:
            text, missing = "not installed", True
        yield Finding(
            level="fail" if missing else "ok",
            name=package,
            text=text,
            remedy="pip install 'weft[gpu]', or serve with --device cpu" if missing else None,
        )
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limited = soft != resource.RLIM_INFINITY
    yield Finding(
        level="warn" if limited else "ok",
        name="memlock",
        text=_gib(soft) if limited else "unlimited",
        remedy="if pinning host memory fails: ulimit -l unlimited (docker: --ulimit memlock=-1)"
        if limited
        else None,
    )


def check_files() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < MIN_FILES
    yield Finding(
        level="warn" if few else "ok",
        name="open files",
        text="unlimited" if soft == resource.RLIM_INFINITY else str(soft),
        remedy=f"every stream is a file: ulimit -n {MIN_FILES}" if few else None,
    )


def check_disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    little = free < MIN_DISK_BYTES
    yield Finding(
        level="warn" if little else "ok",
        name="disk",
        text=f"{_gib(free)} free here",
        remedy="checkpoints and traces need room" if little else None,
    )


def check_port(port: int) -> Iterator[Finding]:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as error:
            yield Finding(
                level="warn",
                name="port",
                text=f"{port}: {error.strerror}",
                remedy="choose another with --port (or see `weft ps`: weft may be serving there)",
            )
            return
    yield Finding(level="ok", name="port", text=f"{port} is free")


def findings(port: int) -> Iterator[Finding]:
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python,
        check_cores,
        check_memory,
        check_memfd,
        check_torch,
        check_files,
        check_disk,
        lambda: check_port(port),
    ]
    for check in checks:
        try:
            yield from check()
        except WeftError as error:
            yield Finding(level="warn", name="memory", text=str(error))


def run_doctor(port: int) -> int:
    """Prints the findings. 1 when one of them is a failure."""
    console = Console(highlight=False, soft_wrap=True)
    failed = False
    for finding in findings(port):
        failed |= finding.level == "fail"
        line = Text()
        line.append(f"{finding.level:<5}", style=COLORS[finding.level])
        line.append(f"{finding.name:<15}{finding.text}")
        if finding.remedy is not None:
            line.append(f"\n{'':<20}-> {finding.remedy}")
        console.print(line)
    return int(failed)

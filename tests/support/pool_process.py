"""A whole pool in a process of its own, for tests: start it, talk to it, hurt it."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

TESTS = Path(__file__).resolve().parents[1]
START_S = 60.0
LOG, TEMP, CONFIG = "pool.log", "temp", "pool.json"


class PoolProcess:
    """A running pool. `url` is where it listens; its log is in `log_file`."""

    def __init__(
        self, process: subprocess.Popen[bytes], url: str, folder: Path, runtime_dir: Path
    ) -> None:
        self.process = process
        self.url = url
        self.log_file = folder / LOG
        self.temp_dir = folder / TEMP
        """What the pool takes for the machine's folder of temporary files."""
        self.config_file = folder / CONFIG
        self.admin_socket = runtime_dir / "weft" / f"admin-{url.rpartition(':')[2]}.sock"

    def worker_pids(self) -> list[int]:
        """Worker processes of this pool that live now."""
        return [pid for pid in children(self.process.pid) if "weft.worker" in command_line(pid)]

    def kill_worker(self) -> bool:
        """SIGKILL a worker. False if none lives at the moment."""
        for pid in self.worker_pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            return True
        return False

    def admin(self, timeout_s: float = 60.0) -> httpx.Client:
        """A client of the admin plane."""
        transport = httpx.HTTPTransport(uds=str(self.admin_socket))
        return httpx.Client(transport=transport, base_url="http://admin", timeout=timeout_s)

    def configure(self, **changes: Any) -> None:
        """Write other top keys into the configuration file; nothing reads it yet."""
        config = json.loads(self.config_file.read_text())
        self.config_file.write_text(json.dumps({**config, **changes}))

    def client(self, timeout_s: float = 60.0) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=timeout_s, limits=limits)

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Until every servable image is built and a worker is up."""
        with httpx.Client(base_url=self.url, timeout=5.0) as client:
            poll(lambda: client.get("/ready").status_code == 200, timeout_s, self)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Stop it and return its exit status."""
        self.process.send_signal(sig)
        return self.process.wait(30)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


@contextmanager
def running_pool(
    folder: Path,
    models: Sequence[dict[str, Any]],
    *,
    engine: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    check: bool = True,
    trace_dir: Path | None = None,
    main: str = "support.pool_main",
    **top: Any,
) -> Iterator[PoolProcess]:
    """A pool on a free port, stopped at the end. `models` as in pool.yaml, paths may be relative
    to `folder`; `top` are further keys of pool.yaml. `main` is the module that the process runs."""
    config = {
        "models": list(models),
        "engine": {
            "device": "cpu",
            "device_memory": "8M",
            "host_memory": "64M",
            "spare_host_memory": "0",
            "cpu_threads": 1,
            **(engine or {}),
        },
        "server": {"port": 0, **(server or {})},
        **top,
    }
    file, log_file = folder / CONFIG, folder / LOG
    file.write_text(json.dumps(config))
    (folder / TEMP).mkdir()
    # Of its own, so that nothing is left in the temporary files, and short: a socket's path is.
    runtime_dir = Path(tempfile.mkdtemp(prefix="weft-test-", dir="/tmp"))
    environment = {
        **os.environ,
        "XDG_RUNTIME_DIR": str(runtime_dir),
        "PYTHONPATH": os.pathsep.join(
            [str(TESTS.parent / "src"), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder / TEMP),
    }
    command = [sys.executable, "-m", main, str(file), str(folder)]
    command += ["check" if check else "plain", str(trace_dir or "-")]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().decode().strip()
        assert url.startswith("http://"), f"the pool did not start:\n{log_file.read_text()}"
        yield PoolProcess(process, url, folder, runtime_dir)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdout.close()
        shutil.rmtree(runtime_dir)


def poll(condition: Any, timeout_s: float, pool: PoolProcess | None = None) -> None:
    """Until `condition()`; the world outside has no event to await."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("did not happen" + (f":\n{pool.log()}" if pool else ""))
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and parent_of(int(entry.name)) == pid:
            found.append(int(entry.name))
    return found


def parent_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = stat.rpartition(")")[2].split()[:2]
    return None if state == "Z" else int(parent)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """Runs (a zombie does not)."""
    return parent_of(pid) is not None


async def sse(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of a stream, until [DONE]. Raises AssertionError if that never comes."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line[len("data: ") :])
    raise AssertionError("the stream ended without [DONE]")


async def stream_text(
    client: httpx.AsyncClient,
    model: str,
    prompt: list[int] | str,
    *,
    on_text: Callable[[], None] | None = None,
    **body: Any,
) -> str:
    """The text of a streamed completion. Raises AssertionError on any error. `on_text` is called
    for every piece of it."""
    payload = {"model": model, "prompt": prompt, "stream": True, **body}
    text: list[str] = []
    finish = None
    async with client.stream("POST", "/v1/completions", json=payload) as response:
        if response.status_code != 200:
            await response.aread()
            raise AssertionError(f"{response.status_code}: {response.text}")
        async for event in sse(response):
            assert "error" not in event, event
            for choice in event["choices"]:
                text.append(choice["text"])
                if on_text is not None:
                    on_text()
                finish = choice["finish_reason"] or finish
    assert finish is not None, "no finish_reason"
    return "".join(text)


async def stream_all(
    pool: PoolProcess, jobs: Sequence[tuple[str, list[int]]], **body: Any
) -> list[str]:
    """The texts of (model, prompt) jobs, all at once."""
    async with pool.client() as client:
        return list(await asyncio.gather(*(stream_text(client, m, p, **body) for m, p in jobs)))

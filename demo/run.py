"""The demo: six models behind one endpoint on a device with room for three, under a real trace.

Run by scripts/demo. Builds the models, serves them with `weft serve`, shows a first answer, replays
the trace over HTTP with streaming, and prints a table. At a terminal it then keeps serving;
elsewhere it ends with 0 only if no request failed.
"""

import argparse
import asyncio
import contextlib
import ctypes
import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import models as demo_models
import torch
from rich.console import Console

from weft.core.errors import WeftError
from weft.replay import cli as replay
from weft.replay.client import Settings
from weft.replay.records import Result
from weft.report.timeline import timeline_svg
from weft.report.trace_file import find_switch, read_worker_trace

ROOT = Path(__file__).resolve().parent.parent
TRACE = ROOT / "demo" / "data" / "azure_llm_2023_slice.csv"
SPEAKER = ROOT / "demo" / "speaker"

DEVICE_MEMORY = {"cpu": "26M", "cuda": "384M"}
"""Room for the weights of three of the six (4 to 8 MB each) and their KV. The CPU's arena has
granules of 1 MiB; CUDA's have 64 MiB, and every model that is in holds at least two of them."""
READY_WITHIN_S = 180
STOP_WITHIN_S = 20
PR_SET_PDEATHSIG = 1


class DemoError(Exception):
    """Said in one line; the server's log says more."""


def write_pool(paths: dict[str, Path], device: str, port: int, work: Path) -> Path:
    """pool.yaml: the six models, a budget for three."""
    lines = ["models:"]
    for name, path in paths.items():
        lines += [f"  - name: {name}", f"    path: {path.resolve()}"]
    lines += [
        "turn_s: 0.5",  # half the default: newcomers wait less, and more is switched
        "engine:",
        f"  device: {device}",
        f"  device_memory: {DEVICE_MEMORY[device]}",
        "  host_memory: 1G",
        "server:",
        f"  port: {port}",
        "  hold_s: 600",  # a slow machine may need longer than the trace lasts
    ]
    path = work / "pool.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _die_with_parent() -> None:
    """In the child, before it becomes the server: it must not outlive a demo that is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def serving(pool: Path, traces: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`weft serve`, stopped at the end whatever happens."""
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "weft.cli.main", "serve", str(pool), "--trace", str(traces)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
    try:
        yield server
    finally:
        server.terminate()
        try:
            server.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until every model's image is in the host store. Raises DemoError."""
    until = time.monotonic() + READY_WITHIN_S
    with httpx.Client(base_url=url, timeout=5.0, trust_env=False) as client:
        while time.monotonic() < until:
            if server.poll() is not None:
                raise DemoError(f"the server ended with {server.returncode}")
            with contextlib.suppress(httpx.TransportError):
                if client.get("/ready").status_code == 200:
                    return
            time.sleep(0.1)
    raise DemoError(f"the server was not ready within {READY_WITHIN_S} s")


def first_answer(url: str, console: Console) -> None:
    """Ask the one that speaks, and show its words as they come."""
    question = "What news from the senate, good Menenius?"
    body = {
        "model": "speaker",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 80,
        "temperature": 0.7,
        "top_k": 40,
        "seed": 4,
    }
    with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
        response = client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise DemoError(f"the first answer failed: {response.text[:300]}")
    answer = response.json()["choices"][0]["message"]["content"]
    console.print(f"You ask:  {question}", highlight=False, markup=False)
    console.print(f"[bold]speaker[/]:  {answer.strip()}\n", highlight=False)


def replay_trace(url: str, args: argparse.Namespace, console: Console) -> Result:
    rows, words = replay.read_trace(TRACE, limit=args.requests, speed=args.speed)
    workload = replay.Workload(rows=rows, words=words, skew=args.skew, seed=args.seed)
    settings = Settings(url=url, seed=args.seed)
    return asyncio.run(
        replay.replay_workload(workload, settings, models=None, text=None, console=console)
    )


def draw_switch(folder: Path, out: Path, console: Console) -> None:
    """A picture of the switch that moved most, from the trace of the worker that ran longest."""
    traces = sorted(folder.glob("trace-unit*.jsonl"), key=lambda path: path.stat().st_size)
    try:
        header, spans = read_worker_trace(traces[-1])
        begin_ns, end_ns = find_switch(spans)
        svg = timeline_svg(header, spans, begin_ns=begin_ns, end_ns=end_ns)
    except (IndexError, WeftError) as error:
        console.print(f"No picture of a switch: {error}", highlight=False, markup=False)
        return
    out.write_text(svg, encoding="utf-8")
    console.print(f"A switch as it happened: {shown(out)}", highlight=False)


def shown(path: Path) -> str:
    """As people in the project's folder would type it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def print_usage(url: str, console: Console) -> None:
    """Lines that work as printed, from the project's folder."""
    print_plain = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    print_plain("Still serving. With curl:\n")
    print_plain(
        f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d "
        '\'{"model": "speaker", "stream": true, "messages": '
        '[{"role": "user", "content": "Shall we to the Capitol?"}]}\'\n'
    )
    print_plain("With the OpenAI SDK:\n")
    if importlib.util.find_spec("openai") is None:
        print_plain(".venv/bin/python -m pip install --quiet openai")
    print_plain(
        ".venv/bin/python - <<'END'\n"
        "from openai import OpenAI\n"
        f'client = OpenAI(base_url="{url}/v1", api_key="none")\n'
        'for name in ("speaker", "loom", "shuttle"):\n'
        '    answer = client.completions.create(model=name, prompt="ROMEO:", max_tokens=40)\n'
        "    print(name, answer.choices[0].text)\n"
        "END\n"
    )
    print_plain(f"Who is on the device: .venv/bin/weft ps --watch --url {url}")
    print_plain("Ctrl-C ends it.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--requests", type=int, default=None, help="only the first so many")
    parser.add_argument("--speed", type=float, default=1.5, help="time runs so many times as fast")
    parser.add_argument("--skew", type=float, default=0.8, help="Zipf exponent over the models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speaker", type=Path, default=SPEAKER, help="another one that speaks")
    parser.add_argument("--work", type=Path, default=ROOT / ".demo", help="for models and results")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def demo(args: argparse.Namespace, console: Console, log: Path) -> int:
    if not (args.speaker / "model.safetensors").exists():
        raise DemoError(f"{args.speaker} is missing; make it with demo/train_speaker.py")
    paths = demo_models.build_all(args.work / "models", speaker=args.speaker, seed=args.seed)
    port = args.port or free_port()
    url = f"http://127.0.0.1:{port}"
    pool = write_pool(paths, args.device, port, args.work)
    size = sum((path / "model.safetensors").stat().st_size for path in paths.values())
    console.print(
        f"{len(paths)} models ({size / 1e6:.0f} MB of weights) on {args.device}, "
        f"device memory {DEVICE_MEMORY[args.device]}: room for three. Serving at {url}",
        highlight=False,
    )
    traces = args.work / "trace"
    shutil.rmtree(traces, ignore_errors=True)
    with serving(pool, traces, log) as server:
        wait_ready(url, server)
        first_answer(url, console)
        result = replay_trace(url, args, console)
        replay.write_result(result, args.work / "result.json")
        replay.show(result, console)
        console.print(
            f"{result.total.switches_in} times a model came onto the device, "
            f"{result.total.failures} requests failed. Every record: .demo/result.json",
            highlight=False,
        )
        draw_switch(traces, args.work / "switch.svg", console)
        code = replay.exit_code(result)
        if not code and console.is_terminal and sys.stdin.isatty():
            print_usage(url, console)
            with contextlib.suppress(KeyboardInterrupt):
                raise DemoError(f"the server ended with {server.wait()}")
    return code


def main() -> int:
    args, console = arguments(), replay.make_console()
    args.work.mkdir(parents=True, exist_ok=True)
    log = args.work / "server.log"
    # Ended from outside, it stops the server as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return demo(args, console, log)
    except KeyboardInterrupt:
        console.print("\nEnded.")
        return 130
    except DemoError as error:
        text = f"demo: {error}; see {shown(log)}"
        console.print(text, style="red", markup=False, soft_wrap=True)
        if log.exists():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            console.print("\n".join(lines), highlight=False, markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())

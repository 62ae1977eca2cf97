"""First light on one GPU: three checkpoints of Qwen2.5-7B's shape where one fits beside its KV.

    PYTHONPATH=src python3 benchmarks/first_light/run.py --out first_light.json
        [--parts promises,switch,workloads] [--work FOLDER] [--tiny] [--commit ID]

Writes random weights as safetensors, reads them back into one host image that serves three names
(each its own copy on the device), and drives the real scheduler over the CUDA executor in one
process. --tiny: a small shape, to try the script. A table is printed last.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import parts  # noqa: E402
from checkpoint import build_into, write_checkpoint  # noqa: E402
from shape import qwen_config, tiny_config  # noqa: E402

from weft.memory.host_store import HostStore  # noqa: E402
from weft.models.hf_config import read_model_config  # noqa: E402
from weft.models.image import image_layout  # noqa: E402

PARTS: dict[str, Callable[["parts.Stage"], dict[str, Any]]] = {
    "promises": parts.promises,
    "switch": parts.switch,
    "workloads": parts.workloads,
}


def command_output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError as error:
        return str(error)
    return done.stdout.strip()


def facts(commit: str | None) -> dict[str, Any]:
    """Hardware, versions, commit, command."""
    query = "name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max"
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "numpy", "msgspec")
    } | {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("triton", "cuda-bindings"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "command": " ".join(sys.argv),
        "commit": commit or command_output("git", "rev-parse", "HEAD") or "unknown",
        "gpu": command_output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "cpu": platform.processor() or platform.machine(),
        "kernel": platform.release(),
        "versions": versions,
    }


def prepare(work: Path, tiny: bool, report: dict[str, Any]) -> "parts.Stage":
    """Checkpoint on disk, image in a host store."""
    folder = work / "qwen-shape"
    config = tiny_config() if tiny else qwen_config()
    report["write"] = write_checkpoint(folder, config)
    arch = read_model_config(folder)
    size = image_layout(arch).num_bytes
    chunk = 1 << 24 if tiny else 1 << 30
    offset = -(-size // chunk) * chunk
    parked = (1 << 26) if tiny else (12 << 30)
    host = HostStore.create(offset + parked)
    seconds = build_into(host, folder, arch)
    report["image"] = {"bytes": size, "seconds": seconds, "gb_per_s": size / seconds / 1e9}
    shutil.rmtree(folder)
    return parts.Stage(
        arch=arch, host=host, host_offset=offset, host_bytes=parked, chunk_bytes=chunk, tiny=tiny
    )


def rows_of(report: dict[str, Any]) -> list[tuple[str, Any]]:
    """The figures people look for."""
    rows: list[tuple[str, Any]] = []
    for part in PARTS:
        for key, value in report.get(part, {}).get("table", {}).items():
            rows.append((f"{part}: {key}", value))
        if "error" in report.get(part, {}):
            rows.append((part, "FAILED: " + report[part]["error"].splitlines()[-1]))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--work", type=Path, default=Path("/tmp/weft-first-light"))
    parser.add_argument("--commit")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    report: dict[str, Any] = facts(options.commit)
    begin = time.perf_counter()
    stage = prepare(options.work, options.tiny, report)
    bad = 0
    for name in options.parts.split(","):
        start = time.perf_counter()
        try:
            report[name] = PARTS[name](stage)
        except Exception:
            bad += 1
            traceback.print_exc(file=sys.stdout)
            report[name] = {"error": traceback.format_exc(limit=8)}
        report[name]["seconds"] = round(time.perf_counter() - start, 1)
        report["seconds"] = round(time.perf_counter() - begin, 1)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"({name}: {report[name]['seconds']} s)", flush=True)
    for key, value in rows_of(report):
        print(f"{key:44} {value}")
    return 1 if bad or any(row[1] is False for row in rows_of(report)) else 0


if __name__ == "__main__":
    sys.exit(main())

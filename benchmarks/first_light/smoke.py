"""Does the CUDA side work at all, and where does its time go? Under two minutes on one GPU.

    PYTHONPATH=src:tests python3 benchmarks/first_light/smoke.py [--skip tests,kernels,steps]

Every part runs, whatever failed before; tracebacks are printed, a short table comes last.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src"), str(ROOT / "tests")]

Table = list[tuple[str, str]]


def tests(table: Table) -> None:
    """tests/gpu, but for the one that serves over HTTP, in a process of their own."""
    names = ("arena", "kernels", "executor", "models")
    command = [
        *(sys.executable, "-m", "pytest", "-q", "--tb=short"),
        *(f"tests/gpu/test_gpu_{name}.py" for name in names),
        *("-p", "no:cacheprovider", "-W", "default", "--timeout", "60"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
    )
    print(done.stdout[-9000:], done.stderr[-1000:])
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    table.append(("tests/gpu", lines[-1] if lines else f"exit {done.returncode}"))


def arena(table: Table) -> None:
    """Mapping speed with granules of 64 MiB."""
    from weft.memory.arena_cuda import CudaArena

    count, size = 128, 64 << 20
    begin = time.perf_counter()
    pool = CudaArena(size, count)
    created = time.perf_counter()
    pool.reserve("a", count * size, size)
    at = list(range(count))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        pool.map("a", "weights", at, at)
        middle = time.perf_counter()
        pool.unmap("a", "weights", at, at)
        times.append((middle - start, time.perf_counter() - middle))
    pool.close()
    best = min(times)
    table.append(
        (
            "arena, 8 GiB",
            f"create {(created - begin) * 1e3:.0f} ms, map {best[0] * 1e3:.1f}, "
            f"unmap {best[1] * 1e3:.1f}",
        )
    )


def kernels(table: Table) -> None:
    """The attention kernels alone, at the 7B shape, on scattered pages."""
    import triton

    from support.kernel_cases import attention_case
    from weft.kernels import paged_attention as pa

    shape = {"q_heads": 28, "kv_heads": 4, "head_dim": 128, "page_tokens": 32}
    for rows, context in ((1, 8192), (1, 32768), (8, 2048), (32, 1024), (128, 512), (256, 600)):
        case = attention_case(
            seed=0,
            starts=[context - 1] * rows,
            counts=[1] * rows,
            dtype=torch.bfloat16,
            device="cuda",
            layers=1,
            layer=0,
            **shape,
        )
        out = torch.empty_like(case.q)
        splits = pa.decode_splits(rows, 4, context)
        lists = [case.int32(x) for x in (case.slots, case.starts, case.row_tokens())]

        def decode(case=case, lists=lists, out=out, splits=splits):  # type: ignore[no-untyped-def]
            pa.decode_attention(
                case.q, case.kv, case.table, *lists, out, scale=case.scale, splits=splits
            )

        ms = triton.testing.do_bench(decode, warmup=20, rep=60, return_mode="median")
        rate = rows * context * 4 * 128 * 2 * 2 / ms / 1e9
        table.append(
            (f"decode {rows} x {context}", f"{ms * 1e3:.0f} us, {rate:.2f} TB/s, {splits} splits")
        )
    for rows, start, count in ((1, 0, 2000), (4, 0, 2000), (1, 6000, 2000), (16, 0, 500)):
        case = attention_case(
            seed=0,
            starts=[start] * rows,
            counts=[count] * rows,
            dtype=torch.bfloat16,
            device="cuda",
            layers=1,
            layer=0,
            **shape,
        )
        out = torch.empty_like(case.q)
        named = list(zip(case.slots, case.starts, case.row_tokens(), case.counts, strict=True))
        cut = pa.cut_chunks(named, pa.chunk_block_tokens(7, 128, 2))
        blocks = pa.ChunkBlocks(*(case.int32(column) for column in cut))

        def chunk(case=case, blocks=blocks, out=out):  # type: ignore[no-untyped-def]
            pa.chunk_attention(case.q, case.kv, case.table, blocks, out, scale=case.scale)

        ms = triton.testing.do_bench(chunk, warmup=20, rep=60, return_mode="median")
        pairs = rows * (count * start + count * (count + 1) / 2)
        rate = 4 * 128 * 28 * pairs / ms / 1e9
        table.append((f"chunk {rows} x {start}+{count}", f"{ms:.2f} ms, {rate:.0f} TFLOP/s"))


def steps(table: Table) -> None:
    """Whole steps of the 7B shape: how long the CPU launches, how long the device runs."""
    from shape import Bench

    bench = Bench(kv_tokens=160_000)
    try:
        for rows, context in ((1, 300), (32, 300), (128, 300), (256, 600)):
            figures = bench.measure([context] * rows, [1] * rows)
            table.append((f"step, decode {rows} at {context}", str(figures)))
        for rows, count in ((1, 512), (1, 2000), (4, 2000)):
            figures = bench.measure([0] * rows, [count] * rows, repeats=6)
            table.append((f"step, prefill {rows} x {count}", str(figures)))
        for name, rows in (
            ("decode 32", bench.rows([300] * 32, [1] * 32)),
            ("prefill 2000", bench.rows([0], [2000])),
        ):
            activity = torch.profiler.ProfilerActivity
            with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
                bench.step(rows)
            print(f"--- {name}")
            averages = profile.key_averages()
            print(
                averages.table(
                    sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=60
                )[:6000]
            )
        peak = torch.cuda.max_memory_reserved() >> 20
        table.append(("torch reserved at most", f"{peak} MiB"))
    finally:
        bench.close()


PARTS: dict[str, Callable[[Table], None]] = {
    "arena": arena,
    "kernels": kernels,
    "tests": tests,
    "steps": steps,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip", default="")
    skipped = set(parser.parse_args().skip.split(","))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    table: Table = [("device", f"{name}, torch {torch.__version__}")]
    bad = 0
    for part, run in PARTS.items():
        if part in skipped:
            continue
        begin = time.perf_counter()
        try:
            run(table)
        except Exception:
            bad += 1
            traceback.print_exc(file=sys.stdout)
            table.append((part, "FAILED"))
        table.append((f"({part})", f"{time.perf_counter() - begin:.1f} s"))
    print(*(f"{key:32} {value}" for key, value in table), sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""Question: what do products with FP8 and 4-bit weights cost beside bfloat16 ones?

    python benchmarks/quant/run.py --out results.json [--tune]

For the four matrices of a layer of Qwen2.5-7B and 1, 8, 32, 128 and 2,048 tokens: the fused kernel,
dequantizing into scratch first, and torch.mm in bfloat16, each from weights that are not in the L2
cache (copies of a matrix are taken in turn, 400 MB together). Time is the median of windows of
device time; the launches of a window are one CUDA graph. Every product is compared with float32
over the very same weights. Then where dequantizing first begins to pay, a layer's four matrices
together. --tune tries launch shapes and prints the best three: what TILES and PREFILL_TOKENS of
`weft.kernels.quant_matmul` should be. Needs a CUDA device; some minutes with --tune.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from weft.core.model import QuantSpec
from weft.kernels.quant_matmul import Tile, TritonQuantMatmul, choose_splits, tile_of
from weft.kernels.quant_weight import QuantWeight, dequantize
from weft.models.quant_layout import run_inputs

Kind = Literal["fp8", "int4"]
FORMS: tuple[tuple[Kind, int], ...] = (("fp8", 0), ("fp8", 128), ("int4", 128))
TOKENS = (1, 8, 32, 128, 2048)
CROSSOVER = (64, 128, 192, 256, 384, 512, 1024)
TUNED = (1, 16, 32, 64, 128, 256)
ROTATE_BYTES = 400 << 20
WINDOWS = 7
MAX_ERROR = {"fused": 0.004, "scratch": 0.006}
"""Relative, of bfloat16 outputs: their own rounding is 0.0017; with scratch weights round too."""


@dataclass(frozen=True)
class Matrix:
    """Of Qwen2.5-7B; blocks and orientation as in the weight image."""

    name: str
    outputs: int
    inputs: int
    blocks: int
    input_major: bool


MATRICES = (
    Matrix("qkv", 4608, 3584, 4, False),
    Matrix("o", 3584, 3584, 1, True),
    Matrix("gate_up", 37888, 3584, 8, False),
    Matrix("down", 3584, 18944, 1, True),
)


def random_weight(kind: Kind, group: int, matrix: Matrix) -> QuantWeight:
    """Weights of standard deviation about 1 / sqrt(inputs)."""
    rows = matrix.outputs // matrix.blocks
    form: Literal["fp8", "awq"] = "fp8" if kind == "fp8" else "awq"
    spec = QuantSpec(form=form, kind=kind, group_size=group, scale_dtype="float16")
    shape = (matrix.blocks, matrix.inputs // (group or matrix.inputs), rows)
    unit = (0.5 + torch.rand(shape, device="cuda")) * matrix.inputs**-0.5
    if kind == "fp8":
        values = torch.randn((matrix.blocks, rows, matrix.inputs), device="cuda")
        data = values.to(torch.float8_e4m3fn).view(torch.uint8)
        zero, scale = None, unit
    else:
        half = (matrix.blocks, rows, matrix.inputs // 2)
        data = torch.randint(0, 256, half, device="cuda", dtype=torch.uint8)
        zero = torch.randint(6, 10, shape, device="cuda", dtype=torch.uint8)
        scale = (unit / 4).half()
    if matrix.input_major:
        data = data.transpose(1, 2).contiguous().transpose(1, 2)
    run = run_inputs(spec, matrix.inputs) if kind == "int4" else 0
    return QuantWeight(kind, data, scale, zero, matrix.inputs, run)


def copies_of(weight: QuantWeight) -> list[QuantWeight]:
    """So many that none is in the L2 cache when its turn comes again."""
    made = [weight]
    for _ in range(ROTATE_BYTES // weight.num_bytes + 1):
        zero = None if weight.zero is None else weight.zero.clone()
        data = torch.empty_like(weight.data).copy_(weight.data)  # the same strides
        made.append(replace(weight, data=data, scale=weight.scale.clone(), zero=zero))
    return made


def time_us(launches: list[Callable[[], object]]) -> float:
    """Device time a launch: median over windows in which all are launched once."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for launch in launches[:2]:
            launch()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(WINDOWS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(launches))
    return statistics.median(times)


def time_dense(matrix: Matrix, tokens: int) -> float:
    """torch.mm in bfloat16, the weight oriented as in the image."""
    x = torch.randn(tokens, matrix.inputs, device="cuda", dtype=torch.bfloat16)
    one = torch.randn(matrix.outputs, matrix.inputs, device="cuda", dtype=torch.bfloat16)
    if matrix.input_major:
        one = one.t().contiguous().t()
    count = ROTATE_BYTES // (one.numel() * 2) + 1
    weights = [one, *(torch.empty_like(one).copy_(one) for _ in range(count))]
    return time_us([lambda w=w: torch.mm(x, w.t()) for w in weights])  # type: ignore[misc]


def time_quant(how: TritonQuantMatmul, weights: list[QuantWeight], x: torch.Tensor) -> float:
    """Microseconds."""
    return time_us([lambda w=w: how(x, w, None) for w in weights])  # type: ignore[misc]


def random_tokens(tokens: int, matrix: Matrix) -> torch.Tensor:
    """[T, I] of unit size."""
    return torch.randn(tokens, matrix.inputs, device="cuda", dtype=torch.bfloat16)


def measure(kind: Kind, group: int, matrix: Matrix, num_sms: int) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens."""
    weights = copies_of(random_weight(kind, group, matrix))
    size = weights[0].num_bytes
    full_OI = dequantize(weights[0], torch.float32)
    for tokens in TOKENS:
        x = random_tokens(tokens, matrix)
        ref = x.float() @ full_OI.t()
        dense_us = time_dense(matrix, tokens)
        row: dict[str, Any] = {"kind": kind, "group": group, "matrix": matrix.name}
        row |= {"tokens": tokens, "weight_bytes": size, "bf16_us": dense_us, "ok": True}
        for prefill in ("fused", "scratch"):
            how = TritonQuantMatmul(num_sms, prefill=prefill)  # type: ignore[arg-type]
            error = float((how(x, weights[0], None).float() - ref).norm() / ref.norm())
            took_us = time_quant(how, weights, x)
            row["ok"] &= error < MAX_ERROR[prefill]
            row[prefill] = {
                "us": took_us,
                "relative_error": error,
                "bytes_per_s": size / took_us * 1e6,
                "speedup": dense_us / took_us,
            }
        yield row


def crossover(num_sms: int) -> Iterator[dict[str, Any]]:
    """A layer's four matrices by both ways."""
    for kind, group in FORMS:
        sums = {tokens: {"fused": 0.0, "scratch": 0.0} for tokens in CROSSOVER}
        for matrix in MATRICES:
            weights = copies_of(random_weight(kind, group, matrix))
            for tokens, prefill in itertools.product(CROSSOVER, ("fused", "scratch")):
                how = TritonQuantMatmul(num_sms, prefill=prefill)  # type: ignore[arg-type]
                x = random_tokens(tokens, matrix)
                sums[tokens][prefill] += time_quant(how, weights, x)
        for tokens, both in sums.items():
            yield {"kind": kind, "group": group, "tokens": tokens, "us": both}


def shapes(kind: Kind, tokens: int) -> Iterator[tuple[Tile, int]]:
    """Launch shapes worth a try."""
    most = max(16, min(128, triton.next_power_of_2(tokens)))
    for block_t in sorted({most, max(16, most // 2)}):
        for block_o, warps, stages, block_i, splits in itertools.product(
            (32, 64, 128), (4, 8), (2, 3, 4), (64, 128), (1, 2, 4, 8)
        ):
            idle = warps == 8 and block_o * block_t < 4096
            same = kind == "int4" and block_i == 64
            if idle or same or (splits > 1 and tokens > 64):
                continue
            yield Tile(block_t, block_o, block_i, warps, stages), splits


def tune(num_sms: int) -> Iterator[dict[str, Any]]:
    """The best launch shapes by form, matrix and tokens, beside what the table says."""
    for (kind, group), matrix in itertools.product(FORMS, MATRICES):
        weights = copies_of(random_weight(kind, group, matrix))[:4]
        for tokens in TUNED:
            x = random_tokens(tokens, matrix)
            tried: list[tuple[float, Tile, int]] = []
            for tile, splits in shapes(kind, tokens):
                how = TritonQuantMatmul(num_sms, prefill="fused", tile=tile, splits=splits)
                try:
                    tried.append((time_quant(how, weights, x), tile, splits))
                except triton.runtime.errors.OutOfResources:
                    continue
            tried.sort(key=lambda one: one[0])
            tile = tile_of(tokens)
            splits = choose_splits(matrix.outputs, matrix.inputs, tokens, tile, num_sms)
            table_us = time_quant(TritonQuantMatmul(num_sms, prefill="fused"), weights, x)
            best = [{"us": us, "splits": n, **asdict(shape)} for us, shape, n in tried[:3]]
            table = {"us": table_us, "splits": splits, **asdict(tile)}
            yield {
                "kind": kind,
                "group": group,
                "matrix": matrix.name,
                "tokens": tokens,
                "best": best,
                "table": table,
            }


def show(result: dict[str, Any]) -> None:
    """Short tables."""
    print(f"{result['device']}")
    print("kind  group matrix   tokens   bf16 us   fused us    x    TB/s error   scratch us    x")
    for row in result["rows"]:
        fused, scratch = row["fused"], row["scratch"]
        print(
            f"{row['kind']:5} {row['group']:5} {row['matrix']:8} {row['tokens']:6} "
            f"{row['bf16_us']:9.1f} {fused['us']:10.1f} {fused['speedup']:5.2f} "
            f"{fused['bytes_per_s'] / 1e12:6.2f} {fused['relative_error']:.4f} "
            f"{scratch['us']:11.1f} {scratch['speedup']:5.2f} {'' if row['ok'] else 'WRONG'}"
        )
    for row in result["crossover"]:
        print(
            f"a layer, {row['kind']:4} {row['group']:4}, {row['tokens']:5} tokens: "
            f"fused {row['us']['fused']:8.1f} us, scratch {row['us']['scratch']:8.1f} us"
        )
    for row in result.get("tuned", ()):
        where = f"{row['kind']:4} {row['group']:4} {row['matrix']:8} {row['tokens']:4}"
        print(f"{where} table {row['table']}")
        for one in row["best"]:
            print(f"{where} best  {one}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Products with quantized weights.")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--commit", help="what is measured")
    parser.add_argument("--tune", action="store_true", help="try launch shapes as well")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    num_sms = properties.multi_processor_count
    cases = itertools.product(FORMS, MATRICES)
    rows = [row for (k, g), matrix in cases for row in measure(k, g, matrix, num_sms)]
    result: dict[str, Any] = {
        "question": "what do products with FP8 and 4-bit weights cost beside bfloat16 ones?",
        "command": "python benchmarks/quant/run.py" + (" --tune" if args.tune else ""),
        "device": f"{properties.name}, {num_sms} SMs",
        "commit": args.commit,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": rows,
        "crossover": list(crossover(num_sms)),
    }
    if args.tune:
        result["tuned"] = list(tune(num_sms))
    show(result)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

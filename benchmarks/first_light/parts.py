"""The parts of first light: promises under switching, switch time, tokens per second."""

import json
import random
import select
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from drive import Drive, Rig, Token
from reference import Reference

from weft.core.actions import CopyKv, Load, StepPlan
from weft.core.events import Cancel
from weft.core.ids import RequestId
from weft.core.model import Architecture, ModelSpec, model_spec
from weft.core.request import Sampling
from weft.core.unit import UnitSpec
from weft.engine.copies import host_tensor
from weft.memory.host_store import HostStore
from weft.models.image import image_layout
from weft.sim.replay_mover import ReplayError
from weft.sim.replayer import CALM, PlanReplayer

WORKLOADS = Path(__file__).parents[1] / "workloads.json"
NAMES = ("a", "b", "c")
MIB = 1 << 20


@dataclass(frozen=True)
class Stage:
    """One image in a host store, and the sizes everything is cut to."""

    arch: Architecture
    host: HostStore
    host_offset: int
    host_bytes: int
    chunk_bytes: int
    tiny: bool

    @property
    def granule_bytes(self) -> int:
        return (2 if self.tiny else 64) * MIB

    def scale(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def spec(self, name: str) -> ModelSpec:
        size = image_layout(self.arch).num_bytes
        return model_spec(name, self.arch, weight_bytes=size, eos_ids=())

    def unit(self, *, kv_tokens: int, models: int = 1, **fields: int) -> UnitSpec:
        """Room for the weights of `models` and so many tokens of KV."""
        spec = self.spec("a")
        weights = -(-spec.weight_bytes // self.granule_bytes)
        kv_bytes = -(-kv_tokens // spec.page_tokens) * spec.page_bytes
        wanted = {"host_offset": self.host_offset, "host_bytes": self.host_bytes, **fields}
        return UnitSpec(
            granule_bytes=self.granule_bytes,
            num_granules=weights * models + -(-kv_bytes // self.granule_bytes),
            host_chunk_bytes=self.chunk_bytes,
            # The workloads are repeated: what is measured is computing.
            prefix_cache=False,
            **wanted,
        )

    def rig(self, unit: UnitSpec, names: Sequence[str] = NAMES, **options: Any) -> Rig:
        specs = [self.spec(name) for name in names]
        return Rig(self.host, self.arch, specs, unit, key="random", **options)


def prompts(stage: Stage, seed: int, lengths: Sequence[int]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(stage.arch.vocab_size) for _ in range(n)] for n in lengths]


StepKey = tuple[str, tuple[tuple[int, int], ...]]


class LogitSums:
    """A logits tap that keeps a checksum of every iteration's logits, computed on the device."""

    def __init__(self) -> None:
        self._kept: list[tuple[StepKey, torch.Tensor]] = []

    def __call__(self, plan: StepPlan, iteration: int, logits: torch.Tensor) -> None:
        words = logits.contiguous().view(torch.int16).view(-1)
        index = torch.arange(words.numel(), device=words.device)
        rows = tuple((int(row.request), row.start + iteration) for row in plan.rows)
        self._kept.append(((plan.model, rows), (words.long() * (2 * index + 1)).sum()))

    def values(self) -> dict[StepKey, list[int]]:
        """Per step and iteration. Steps of different models may be launched in any order."""
        out: dict[StepKey, list[int]] = {}
        for key, value in self._kept:
            out.setdefault(key, []).append(int(value))
        return out


def free_mib() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] // MIB


# -- promises -------------------------------------------------------------------------------------


def promises(stage: Stage) -> dict[str, Any]:
    """1 (bytes), 2 (same steps, same bits), 4 (near the float32 best), device memory flat."""
    switched = _switched_run(stage)
    steps, sums = switched.pop("steps"), switched.pop("sums")
    streams = switched.pop("streams")
    replayed = _replay(stage, steps, sums)
    plain = _plain_streams(stage)
    near = _near_the_best(stage, plain, streams)
    table = {
        "switches": switched["switches"],
        "1: pages and extents compared, all equal": switched["compared"],
        "2: steps replayed, bits equal": replayed["equal"],
        "4: every token within delta": near["within"],
        "4: worst shortfall / delta": f"{near['worst_switched']:.4f} / {near['delta']:.4f}",
        "device memory lost, MiB": switched["lost_mib"],
    }
    return {"table": table, "switched": switched, "replayed": replayed, "near": near}


def _switched_run(stage: Stage) -> dict[str, Any]:
    wanted = stage.scale(100, 12)
    lengths = [random.Random(n).randint(100, 300) for n in range(8)]
    lengths = [n // stage.scale(1, 8) for n in lengths]
    sums = LogitSums()
    unit = stage.unit(kv_tokens=stage.scale(20_000, 2_000), num_slots=64, max_rows=32)
    with stage.rig(unit, verify=True, logits_tap=sums) as rig:
        drive = Drive(rig, turn_s=stage.scale(150, 30) / 1e3)
        owners: dict[RequestId, list[int]] = {}
        for i, name in enumerate(NAMES):
            for prompt in prompts(stage, i, lengths):
                owners[drive.request(name, prompt, stage.scale(1500, 300))] = prompt
        drive.run_until(lambda: drive.loads >= 4)
        before = free_mib()
        begin, first_token = time.perf_counter(), len(drive.tokens)
        drive.run_until(lambda: drive.loads >= wanted or not drive.open, 300)
        seconds = time.perf_counter() - begin
        lost = before - free_mib()
        for request in owners:
            if request not in drive.finished:
                drive.tell(Cancel(request=request))
        drive.drain()
        assert not drive.errors, drive.errors[:3]
        assert rig.executor.checksums is not None
        copies = [m for m in drive.moved if isinstance(m.action, CopyKv)]
        return {
            "how": "real scheduler and CUDA executor in one process; checksums on the device",
            "switches": drive.loads,
            "parked": sum(m.action.to == "host" for m in copies if isinstance(m.action, CopyKv)),
            "resumed": sum(m.action.to == "device" for m in copies if isinstance(m.action, CopyKv)),
            "compared": rig.executor.checksums.compared,
            "tokens": len(drive.tokens) - first_token,
            "seconds": round(seconds, 2),
            "lost_mib": lost,
            "steps": drive.recorder.record(),
            "sums": sums.values(),
            "streams": [(owners[r], list(drive.emitted[r])) for r in owners if drive.emitted[r]],
        }


def _replay(stage: Stage, steps: Any, wanted: dict[StepKey, list[int]]) -> dict[str, Any]:
    """The plan log of the switched run, plainly: all three resident, nothing parked."""
    sums = LogitSums()
    unit = stage.unit(
        kv_tokens=stage.scale(80_000, 12_000), models=3, num_slots=64, max_rows=32, max_repeat=16
    )
    with stage.rig(unit, logits_tap=sums) as rig:
        replayer = PlanReplayer(unit, rig.specs, steps, disturbances=CALM)
        events: Sequence[Any] = ()
        while True:
            for action in replayer.handle(events):
                rig.executor.submit(action)
            if replayer.done:
                break
            events = rig.executor.poll()
            while not events:
                ready, _, _ = select.select([rig.executor.wait_fd()], [], [], 60.0)
                if not ready:
                    raise ReplayError("the replay is stuck")
                events = rig.executor.poll()
        got = sums.values()
    tokens = replayer.mismatches()
    differing = sum(value != got.get(key) for key, value in wanted.items())
    return {
        "steps": len(steps),
        "iterations": len(wanted),
        "iterations_replayed": len(got),
        "differing_logits": differing,
        "differing_tokens": len(tokens),
        "first": tokens[:3],
        "equal": not tokens and not differing and len(got) == len(wanted),
    }


def _plain_streams(stage: Stage) -> list[tuple[list[int], list[int]]]:
    """Undisturbed greedy streams of one model, for delta."""
    unit = stage.unit(kv_tokens=stage.scale(20_000, 2_000), num_slots=64, max_rows=32)
    with stage.rig(unit, NAMES[:1]) as rig:
        drive = Drive(rig, policy="dedicated")
        lengths = [random.Random(n).randint(100, 300) // stage.scale(1, 8) for n in range(16)]
        owners = {
            drive.request("a", prompt, stage.scale(400, 60)): prompt
            for prompt in prompts(stage, 77, lengths)
        }
        drive.drain()
        assert not drive.errors, drive.errors[:3]
        return [(prompt, drive.emitted[request]) for request, prompt in owners.items()]


def _near_the_best(
    stage: Stage,
    plain: list[tuple[list[int], list[int]]],
    switched: list[tuple[list[int], list[int]]],
) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = image_layout(stage.arch).num_bytes
    reference = Reference(stage.arch, host_tensor(stage.host)[:size], device)
    fall = reference.shortfalls([*plain, *switched])
    own, moved = torch.cat(fall[: len(plain)]), torch.cat(fall[len(plain) :])
    delta = 3 * float(own.max())
    return {
        "how": "float32 teacher-forced pass over every stream; shortfall = best logit - its own",
        "plain_tokens": own.numel(),
        "switched_tokens": moved.numel(),
        "worst_plain": float(own.max()),
        "delta": delta,
        "worst_switched": float(moved.max()),
        "not_the_best": int((moved > 0).sum()),
        "beyond_delta": int((moved > delta).sum()),
        "within": not bool((moved > delta).any()) and delta > 0,
    }


# -- switch time ----------------------------------------------------------------------------------


def switch(stage: Stage) -> dict[str, Any]:
    """From the last token of one model to the first token of the next, by the tokens' own times."""
    rows, context = stage.scale(32, 4), stage.scale(1000, 40)
    unit = stage.unit(
        kv_tokens=stage.scale(60_000, 3_000), num_slots=64, max_rows=32, max_step_tokens=2048
    )
    with stage.rig(unit, NAMES[:2]) as rig:
        pinned = rig.wait_registered(stage.host_offset + stage.host_bytes)
        drive = Drive(rig, turn_s=stage.scale(500, 50) / 1e3)
        for prompt in prompts(stage, 0, [context] * rows):
            drive.request("a", prompt, stage.scale(20_000, 400))
        drive.run_until(lambda: len(drive.tokens) > 3 * rows)
        full, back = [], []
        for i in range(stage.scale(8, 3)):
            full.append(_switch_once(stage, drive, "a", "b", i))
            back.append(_await_return(drive, "b", "a"))
        for request in list(drive.emitted):
            if request not in drive.finished:
                drive.tell(Cancel(request=request))
        drive.drain()
        empty = []
        for i in range(stage.scale(8, 3)):
            empty.append(_switch_empty(stage, drive, "ab"[i % 2], i))
        assert not drive.errors, drive.errors[:3]
        return {
            "table": _switch_table(full, back, empty),
            "how": "real scheduler (preset weft, turns of 0.5 s) and CUDA executor, one process",
            "registered_seconds": pinned,
            "park_and_load": full,
            "drop_and_resume": back,
            "load_only": empty,
        }


def _switch_once(stage: Stage, drive: Drive, old: str, new: str, seed: int) -> dict[str, Any]:
    """`new` gets one request of one token while `old` decodes."""
    (prompt,) = prompts(stage, 1000 + seed, [stage.scale(128, 16)])
    moved, seen = len(drive.moved), len(drive.tokens)
    request = drive.request(new, prompt, 1)
    drive.run_until(lambda: bool(drive.emitted[request]))
    return _between(drive, old, new, drive.tokens[seen:], moved)


def _await_return(drive: Drive, old: str, new: str) -> dict[str, Any]:
    """The turn comes back: the parked requests are resumed and decode."""
    moved, seen = len(drive.moved), len(drive.tokens) - 1
    drive.run_until(lambda: any(t.model == new for t in drive.tokens[seen:]))
    figures = _between(drive, old, new, drive.tokens[seen:], moved)
    drive.run_until(lambda: sum(t.model == new for t in drive.tokens[seen:]) > 200)
    return figures


def _between(
    drive: Drive, old: str, new: str, tokens: list[Token], first_moved: int
) -> dict[str, Any]:
    first = next(t.at_ns for t in tokens if t.model == new)
    last = max(t.at_ns for t in tokens if t.model == old and t.at_ns <= first)
    return {"switch_s": (first - last) / 1e9, **_copies(drive, first_moved, last)}


def _copies(drive: Drive, first_moved: int, last_ns: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    kinds: dict[str, list[Any]] = {"park": [], "resume": [], "load": []}
    for moved in drive.moved[first_moved:]:
        if isinstance(moved.action, Load):
            kinds["load"].append(moved)
        elif isinstance(moved.action, CopyKv):
            kinds["park" if moved.action.to == "host" else "resume"].append(moved)
    for kind, items in kinds.items():
        if not items:
            continue
        size = sum(m.num_bytes for m in items)
        busy = sum(m.device_ns for m in items)
        out[kind] = {
            "bytes": size,
            "copies": len(items),
            "device_s": busy / 1e9,
            "gb_per_s": size / max(busy, 1),
            "submitted_s": (min(m.submitted_ns for m in items) - last_ns) / 1e9,
            "ended_s": (max(m.ended_ns for m in items) - last_ns) / 1e9,
        }
    return out


def _switch_empty(stage: Stage, drive: Drive, name: str, seed: int) -> dict[str, Any]:
    """The other model is resident or nothing is; nobody decodes: from the request's arrival."""
    (prompt,) = prompts(stage, 2000 + seed, [stage.scale(128, 16)])
    moved, begin = len(drive.moved), time.monotonic_ns()
    request = drive.request(name, prompt, 1)
    drive.run_until(lambda: bool(drive.emitted[request]))
    first = max(t.at_ns for t in drive.tokens)
    drive.drain()
    return {"switch_s": (first - begin) / 1e9, **_copies(drive, moved, begin)}


def _switch_table(
    full: list[dict[str, Any]], back: list[dict[str, Any]], empty: list[dict[str, Any]]
) -> dict[str, str]:
    def both(values: list[float], unit: str) -> str:
        if not values:
            return "none"
        return f"{statistics.median(values):.3f} median, {max(values):.3f} worst {unit}"

    def rates(items: list[dict[str, Any]], kind: str) -> str:
        values = [x[kind]["gb_per_s"] for x in items if kind in x]
        if not values:
            return "none"
        return f"{statistics.median(values):.1f} median, {min(values):.1f} worst GB/s"

    parked = max((x["park"]["bytes"] for x in full if "park" in x), default=0)
    return {
        f"switch, {parked / 1e9:.2f} GB to park": both([x["switch_s"] for x in full], "s"),
        "switch back, that to resume": both([x["switch_s"] for x in back], "s"),
        "switch, nothing to park": both([x["switch_s"] for x in empty if "load" in x], "s"),
        "park": rates(full, "park"),
        "resume": rates(back, "resume"),
        "load": rates([*full, *back, *empty], "load"),
    }


# -- tokens per second ----------------------------------------------------------------------------


def workloads(stage: Stage) -> dict[str, Any]:
    """The five offline workloads, everything submitted at once, model resident."""
    wanted = {k: v for k, v in json.loads(WORKLOADS.read_text()).items() if isinstance(v, dict)}
    unit = stage.unit(
        kv_tokens=stage.scale(330_000, 20_000),
        num_slots=256,
        max_rows=256,
        max_step_tokens=stage.scale(8192, 512),
        max_repeat=16,
    )
    out: dict[str, Any] = {}
    with stage.rig(unit, NAMES[:1]) as rig:
        drive = Drive(rig, policy="dedicated")
        for prompt in prompts(stage, 5, [64] * 4):
            drive.request("a", prompt, 8, Sampling(temperature=0.6, seed=1))
        drive.drain()
        for name, lengths in wanted.items():
            out[name] = _workload(stage, drive, lengths)
            print(name, out[name], flush=True)
        assert not drive.errors, drive.errors[:3]
    table = {
        name: f"{x['seconds']:.2f} s, {x['output_per_s']:.0f} output tok/s, "
        f"{x['all_per_s']:.0f} all tok/s"
        for name, x in out.items()
    }
    return {"table": table, "workloads": out}


def _workload(stage: Stage, drive: Drive, lengths: dict[str, list[int]]) -> dict[str, Any]:
    shrink = stage.scale(1, 16)
    ins = [max(1, n // shrink) for n in lengths["prompt_tokens"]]
    outs = [max(1, n // shrink) for n in lengths["output_tokens"]]
    texts = prompts(stage, 9, ins)
    steps, spent = len(drive.step_device_ns), dict(drive.loop_ns)
    begin = time.perf_counter()
    for i, (prompt, count) in enumerate(zip(texts, outs, strict=True)):
        drive.request("a", prompt, count, Sampling(temperature=0.6, seed=i))
    drive.drain()
    seconds = time.perf_counter() - begin
    device = drive.step_device_ns[steps:]
    return {
        "seconds": seconds,
        "output_per_s": sum(outs) / seconds,
        "all_per_s": (sum(ins) + sum(outs)) / seconds,
        "steps": len(device),
        "device_s": sum(device) / 1e9,
        "loop_s": {k: round((v - spent[k]) / 1e9, 3) for k, v in drive.loop_ns.items()},
    }

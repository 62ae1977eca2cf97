"""The record of what a worker did, for people (a timeline) and for promise 2 (replay of steps).

With `trace_dir` set, every incarnation writes two files of JSON lines:

`trace-unit{U}-{I}.jsonl`. First line, the header:

    {"weft_trace": 1, "unit": 0, "incarnation": 1, "device": "NVIDIA H200",
     "clock": "CLOCK_MONOTONIC", "pid": 4711}

then one line per action when it has ended, in the order of the ends. All times are integer
nanoseconds of CLOCK_MONOTONIC, the same clock for all processes of a machine:

    id            the action's id
    kind          Run | Load | Drop | MapKv | UnmapKv | CopyKv | Interrupt
    model         name, absent for Interrupt
    planned_ns    the instant of the decision
    submitted_ns  the executor had it
    done_ns       the worker heard of its end
    device_ns     time on the device, 0 where the executor does not say
    bytes         bytes copied (Load, CopyKv), else 0
    ok            false if it ended in Failed; then `cause`
    after         ids it had to follow
    Run only:     rows, tokens (input tokens of the first iteration), prefill_rows, iterations,
                  lane, follow (absent if none), requests (ids of the rows)
    CopyKv only:  request (-1: of the prefix cache), kv_tokens, pages, to ("host" | "device")
    Load, Drop, MapKv, UnmapKv: granules (how many)

A device runs the actions between their `after` and their end; `done_ns - device_ns` is the best
guess of the beginning.

`plan-unit{U}-{I}.jsonl`: every action as it was submitted (`weft.core.actions`, msgspec's JSON with
its "type" tag), in the order of submission: the plan log.
"""

import os
from pathlib import Path
from typing import Any

import msgspec

from weft.core.actions import CopyKv, Drop, Interrupt, Load, MapKv, Run, UnitAction, UnmapKv
from weft.core.events import CopyDone, Done, Failed, StepDone, UnitEvent
from weft.core.ids import ActionId

_ENCODER = msgspec.json.Encoder()


class Recorder:
    """Writes both files. `close` (or the end of the process) loses at most a buffer."""

    def __init__(self, folder: Path, unit: int, incarnation: int, device: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"unit{unit}-{incarnation}.jsonl"
        # Line-buffered: a worker that is killed leaves whole lines.
        self._trace = (folder / f"trace-{name}").open("w", buffering=1, encoding="utf-8")
        self._plan = (folder / f"plan-{name}").open("w", buffering=1, encoding="utf-8")
        self._open: dict[ActionId, dict[str, Any]] = {}
        self._iterations: dict[ActionId, int] = {}
        self._device_ns: dict[ActionId, int] = {}
        header = {
            "weft_trace": 1,
            "unit": unit,
            "incarnation": incarnation,
            "device": device,
            "clock": "CLOCK_MONOTONIC",
            "pid": os.getpid(),
        }
        self._trace.write(_line(header))

    def submitted(self, action: UnitAction, planned_ns: int, now_ns: int) -> None:
        self._open[action.id] = {
            "id": action.id,
            "kind": type(action).__name__,
            **_details(action),
            "planned_ns": planned_ns,
            "submitted_ns": now_ns,
        }
        self._plan.write(_line(action))

    def ended(self, event: UnitEvent, now_ns: int) -> None:
        """Call with every event; those that end no action are passed over."""
        match event:
            case StepDone(action=action):
                self._iterations[action] = self._iterations.get(action, 0) + event.iterations
                self._device_ns[action] = self._device_ns.get(action, 0) + event.device_ns
                if event.last:
                    self._end(
                        action,
                        now_ns,
                        device_ns=self._device_ns.pop(action),
                        iterations=self._iterations.pop(action),
                    )
            case CopyDone(action=action):
                self._end(action, now_ns, device_ns=event.device_ns, bytes=event.num_bytes)
            case Done(action=action):
                self._end(action, now_ns)
            case Failed(action=action):
                self._iterations.pop(action, None)
                self._device_ns.pop(action, None)
                self._end(action, now_ns, ok=False, cause=event.cause)

    def _end(self, action: ActionId, now_ns: int, **facts: Any) -> None:
        line = self._open.pop(action, None)
        if line is not None:
            defaults = {"done_ns": now_ns, "device_ns": 0, "bytes": 0, "ok": True}
            self._trace.write(_line({**line, **defaults, **facts}))

    def close(self) -> None:
        self._trace.close()
        self._plan.close()


def _line(value: Any) -> str:
    return _ENCODER.encode(value).decode() + "\n"


def _details(action: UnitAction) -> dict[str, Any]:
    match action:
        case Run(plan=plan):
            facts = {
                "model": plan.model,
                "rows": len(plan.rows),
                "tokens": sum(row.num_tokens for row in plan.rows),
                "prefill_rows": sum(row.input is not None for row in plan.rows),
                "lane": action.lane,
                "requests": [row.request for row in plan.rows],
            }
            if action.follow is not None:
                facts["follow"] = action.follow
        case CopyKv():
            facts = {
                "model": action.model,
                "request": action.request,
                "kv_tokens": action.tokens,
                "pages": len(action.pages),
                "to": action.to,
            }
        case Load() | Drop() | MapKv() | UnmapKv():
            facts = {"model": action.model, "granules": len(action.granules)}
        case Interrupt():
            facts = {"target": action.target}
    return {**facts, "after": list(action.after)}

"""An executor with tiny models bound, driven by hand: for tests that need no scheduler.

models = tiny_models(tmp_path, {"a": {}, "b": {"family": "qwen2"}}, dtype="float64")
with Engine(models, unit_for(models)) as engine:
    tokens = plain_run(engine, "a", prompt=[1, 2, 3], max_tokens=8)
"""

import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.tiny import tiny_checkpoint
from support.tiny_adapter import tiny_adapter
from weft.core.actions import (
    CopyKv,
    Drop,
    Load,
    MapKv,
    Row,
    Run,
    StepPlan,
    UnitAction,
    UnmapKv,
)
from weft.core.events import Failed, StepDone, UnitEvent
from weft.core.ids import ActionId, GranuleId, ModelName, PageId, RequestId, SlotId
from weft.core.model import AdapterShape, Architecture, ModelSpec, adapter_spec, model_spec
from weft.core.request import Extent, Sampling
from weft.core.unit import UnitSpec
from weft.engine.base import Executor, ImageRef
from weft.engine.cpu_executor import CpuExecutor
from weft.memory.host_store import HostStore
from weft.models.adapter import adapter_key, adapter_layout, build_adapter, read_adapter
from weft.models.hf_config import read_eos_ids, read_model_config
from weft.models.image import build_image, image_key, image_layout
from weft.models.safetensors_file import open_checkpoint

GRANULE_BYTES = 12288
"""Three system pages: neither pages nor weights fit it evenly, so everything straddles."""
WAIT_S = 60.0
ALIGN_BYTES = 4096


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint on disk and what the engine wants to know of it."""

    path: Path
    arch: Architecture
    spec: ModelSpec
    adapter: AdapterShape | None = None
    """It is an adapter; `arch` is its base's."""


def tiny_models(
    folder: Path,
    wanted: Mapping[str, Mapping[str, Any]],
    *,
    dtype: str = "float32",
    page_tokens: int = 4,
    max_context_tokens: int | None = None,
) -> dict[str, TinyModel]:
    """Make a tiny checkpoint per name; the values are arguments of `tiny_checkpoint`."""
    out: dict[str, TinyModel] = {}
    for i, (name, arguments) in enumerate(wanted.items()):
        path = tiny_checkpoint(folder / name, **{"seed": i, "tokenizer": False, **arguments})
        arch = read_model_config(path, dtype)
        spec = model_spec(
            name,
            arch,
            weight_bytes=image_layout(arch).num_bytes,
            eos_ids=read_eos_ids(path),
            max_context_tokens=max_context_tokens,
            page_tokens=page_tokens,
        )
        out[name] = TinyModel(path, arch, spec)
    return out


def tiny_adapters(
    folder: Path, models: Mapping[str, TinyModel], wanted: Mapping[str, Mapping[str, Any]]
) -> dict[str, TinyModel]:
    """Make a tiny adapter per name; the values have `base` and arguments of `tiny_adapter`."""
    out: dict[str, TinyModel] = {}
    for i, (name, arguments) in enumerate(wanted.items()):
        base = models[arguments["base"]]
        others = {key: value for key, value in arguments.items() if key != "base"}
        path = tiny_adapter(folder / name, base.arch, **{"seed": i, **others})
        shape = read_adapter(path, base.arch)
        size = adapter_layout(base.arch, shape).num_bytes
        spec = adapter_spec(name, base.spec, weight_bytes=size, pinned=False)
        out[name] = TinyModel(path, base.arch, spec, shape)
    return out


def unit_for(
    models: Mapping[str, TinyModel],
    *,
    num_granules: int | None = None,
    kv_tokens: int = 256,
    parked_bytes: int = 4 << 20,
    granule_bytes: int = GRANULE_BYTES,
    **fields: Any,
) -> UnitSpec:
    """A unit that holds all the models and `kv_tokens` of each, unless `num_granules` is given."""
    if num_granules is None:
        num_granules = sum(
            -(-model.spec.weight_bytes // granule_bytes)
            + -(-kv_tokens * model.arch.kv_bytes_per_token // granule_bytes)
            for model in models.values()
        )
    images = sum(model.spec.weight_bytes for model in models.values())
    wanted: dict[str, Any] = {
        "host_offset": images,
        "host_bytes": parked_bytes,
        "host_chunk_bytes": 1 << 16,
        "num_slots": 8,
        "max_rows": 8,
        "max_step_tokens": 64,
        **fields,
    }
    return UnitSpec(granule_bytes=granule_bytes, num_granules=num_granules, **wanted)


def fill_store(
    models: Mapping[str, TinyModel], num_bytes: int
) -> tuple[HostStore, dict[str, ImageRef]]:
    """A host store with the images of all models at its beginning."""
    host = HostStore.create(num_bytes)
    images: dict[str, ImageRef] = {}
    at = 0
    for name, model in models.items():
        size = model.spec.weight_bytes
        with host.view(at, size) as out:
            if model.adapter is not None:
                build_adapter(model.path, model.arch, model.adapter, out)
                key = adapter_key(model.path, model.arch)
            else:
                with open_checkpoint(model.path) as checkpoint:
                    build_image(checkpoint, model.arch, out)
                key = image_key(model.path, model.arch)
        images[name] = ImageRef(
            key=key,
            offset=at,
            num_bytes=size,
            tokenizer=str(model.path / "tokenizer.json"),
        )
        at += size
    return host, images


def await_events(executor: Executor, enough: Callable[[list[UnitEvent]], bool]) -> list[UnitEvent]:
    """Poll until `enough(events so far)`. Raises TimeoutError."""
    events: list[UnitEvent] = list(executor.poll())
    deadline_s = time.monotonic() + WAIT_S
    while not enough(events):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"no end in sight; so far: {events}")
        select.select([executor.wait_fd()], [], [], left_s)
        events.extend(executor.poll())
    return events


def is_end(event: UnitEvent) -> bool:
    """Whether the event ends an action."""
    return not isinstance(event, StepDone) or event.last


class ActionFailed(AssertionError):
    """An action that should have worked did not."""


class Engine:
    """A host store, an executor and its models. `make` builds another executor than the CPU's."""

    def __init__(
        self,
        models: Mapping[str, TinyModel],
        unit: UnitSpec,
        *,
        make: Callable[..., Executor] = CpuExecutor,
        **options: Any,
    ) -> None:
        """options go to the executor; on the CPU verify and poison are on unless given."""
        self.models, self.unit = dict(models), unit
        self.host, self.images = fill_store(models, unit.host_offset + unit.host_bytes)
        if make is CpuExecutor:
            options = {"verify": True, "poison": True, **options}
        self.executor = make(unit, self.host, **options)
        for name, model in models.items():
            self.executor.bind(model.spec, model.arch, self.images[name], model.adapter)
        self.ends: dict[int, UnitEvent] = {}
        self.drawn: dict[int, list[tuple[int, ...]]] = {}
        """Tokens per iteration of every Run, whole once its end is in `ends`."""
        self._last_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Executor and host store."""
        self.executor.close()
        self.host.close()

    def next_id(self) -> ActionId:
        self._last_id += 1
        return ActionId(self._last_id)

    def submit(self, action: UnitAction) -> ActionId:
        self.executor.submit(action)
        return action.id

    def collect(self, events: Sequence[UnitEvent]) -> None:
        for event in events:
            action = getattr(event, "action", -1)
            if isinstance(event, StepDone):
                self.drawn.setdefault(action, []).extend(event.tokens)
            if is_end(event):
                assert action not in self.ends, f"action {action} ended twice"
                self.ends[action] = event

    def wait(self, *actions: int) -> list[UnitEvent]:
        """The ends of these actions, failed or not."""
        missing = set(actions) - self.ends.keys()

        def enough(events: list[UnitEvent]) -> bool:
            ended = {getattr(event, "action", -1) for event in events if is_end(event)}
            return missing <= ended

        self.collect(await_events(self.executor, enough))
        return [self.ends[action] for action in actions]

    def do(self, action: UnitAction) -> UnitEvent:
        """Submit, wait, and insist that it worked."""
        (end,) = self.wait(self.submit(action))
        if isinstance(end, Failed):
            raise ActionFailed(f"{type(action).__name__} {action.id}: {end.cause}")
        return end

    # -- actions --------------------------------------------------------------------------------

    def weight_granules(self, model: str) -> int:
        return -(-self.models[model].spec.weight_bytes // self.unit.granule_bytes)

    def load(self, model: str, granules: Sequence[int], **fields: Any) -> Load:
        ids = tuple(GranuleId(g) for g in granules)
        return Load(id=self.next_id(), model=ModelName(model), granules=ids, **fields)

    def drop(self, model: str, granules: Sequence[int], **fields: Any) -> Drop:
        ids = tuple(GranuleId(g) for g in granules)
        return Drop(id=self.next_id(), model=ModelName(model), granules=ids, **fields)

    def map_kv(self, model: str, granules: Mapping[int, int], **fields: Any) -> MapKv:
        """granules: physical granule by virtual granule."""
        at, ids = tuple(granules), tuple(GranuleId(g) for g in granules.values())
        return MapKv(id=self.next_id(), model=ModelName(model), at=at, granules=ids, **fields)

    def unmap_kv(self, model: str, granules: Mapping[int, int], **fields: Any) -> UnmapKv:
        at, ids = tuple(granules), tuple(GranuleId(g) for g in granules.values())
        return UnmapKv(id=self.next_id(), model=ModelName(model), at=at, granules=ids, **fields)

    def copy_kv(
        self,
        model: str,
        to: Any,
        pages: Sequence[int],
        extents: Sequence[Extent],
        *,
        request: int = 1,
        **fields: Any,
    ) -> CopyKv:
        return CopyKv(
            id=self.next_id(),
            model=ModelName(model),
            request=RequestId(request),
            pages=tuple(PageId(p) for p in pages),
            extents=tuple(extents),
            tokens=len(pages) * self.models[model].spec.page_tokens,
            to=to,
            **fields,
        )

    def run(self, model: str, rows: Sequence[Row], *, repeat: int = 1, **fields: Any) -> Run:
        plan = StepPlan(model=ModelName(model), rows=tuple(rows), repeat=repeat)
        return Run(id=self.next_id(), plan=plan, **fields)


def row(
    start: int,
    input: Sequence[int] | None,
    *,
    request: int = 1,
    slot: int = 0,
    sample: Sampling | None = Sampling(),  # noqa: B008 (frozen)
    pages: Sequence[int] = (),
    **fields: Any,
) -> Row:
    """A row; `pages` are written at fields["first_page"] (default 0)."""
    return Row(
        request=RequestId(request),
        slot=SlotId(slot),
        start=start,
        num_tokens=1 if input is None else len(input),
        input=None if input is None else tuple(input),
        sample=sample,
        append_pages=tuple(PageId(p) for p in pages),
        **fields,
    )


@contextmanager
def resident(engine: Engine, model: str, pages: int, adapter: str | None = None) -> Iterator[None]:
    """Weights loaded and KV mapped for pages 0 .. pages - 1, from granule 0 up; undone after."""
    spec, unit = engine.models[model].spec, engine.unit
    held: dict[str, range] = {}
    at = 0
    for name in (model, *([] if adapter is None else [adapter])):
        held[name] = range(at, at + engine.weight_granules(name))
        at = held[name].stop
        engine.do(engine.load(name, held[name]))
    count = -(-pages * spec.page_bytes // unit.granule_bytes)
    kv = {i: at + i for i in range(count)}
    engine.do(engine.map_kv(model, kv))
    yield
    engine.do(engine.unmap_kv(model, kv))
    for name, weights in held.items():
        engine.do(engine.drop(name, weights))


def plain_run(
    engine: Engine,
    model: str,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    min_tokens: int = 0,
    chunk: int | None = None,
    adapter: str | None = None,
) -> tuple[int, ...]:
    """One request alone on an idle engine, step by step: the tokens it draws.

    Ends after max_tokens or with a stop id (which is part of the answer here). The prompt goes in
    chunks of `chunk` tokens, else as large as a step allows.
    """
    spec, wanted = engine.models[model].spec, sampling or Sampling()
    pages = list(range(-(-(len(prompt) + max_tokens) // spec.page_tokens)))
    size = min(chunk or len(prompt), engine.unit.max_step_tokens)
    out: list[int] = []
    name = None if adapter is None else ModelName(adapter)
    with resident(engine, model, len(pages), adapter):
        for at in range(0, len(prompt), size):
            last = at + size >= len(prompt)
            prefill = row(
                at,
                prompt[at : at + size],
                sample=wanted if last else None,
                pages=pages if at == 0 else (),
                stop_ids=tuple(stop_ids),
                min_remaining=min_tokens if last else 0,
                adapter=name,
            )
            run = engine.run(model, [prefill])
            engine.do(run)
        out.append(engine.drawn[run.id][-1][0])
        while len(out) < max_tokens and not (out[-1] in stop_ids and len(out) > min_tokens):
            decode = row(
                len(prompt) + len(out) - 1,
                None,
                sample=wanted,
                output_index=len(out),
                stop_ids=tuple(stop_ids),
                min_remaining=max(0, min_tokens - len(out)),
                adapter=name,
            )
            run = engine.run(model, [decode])
            engine.do(run)
            out.append(engine.drawn[run.id][0][0])
    return tuple(out)

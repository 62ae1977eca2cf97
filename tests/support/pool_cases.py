"""Small values for tests of the pool, the hub and the worker."""

from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import Extent, ParkedKv, Request
from weft.core.unit import ModelStatus, UnitStatus

VOCAB = 1000


def spec(name: str = "m", *, max_context_tokens: int = 512) -> ModelSpec:
    return ModelSpec(
        name=ModelName(name),
        weight_bytes=1 << 20,
        num_layers=2,
        page_tokens=16,
        page_bytes=4096,
        max_context_tokens=max_context_tokens,
        vocab_size=VOCAB,
    )


def request(
    i: int,
    model: str = "m",
    *,
    prompt: tuple[int, ...] = (1, 2, 3),
    max_tokens: int = 4,
    hold_deadline_ns: int | None = None,
) -> Request:
    return Request(
        id=RequestId(i),
        model=ModelName(model),
        prompt=prompt,
        max_tokens=max_tokens,
        hold_deadline_ns=hold_deadline_ns,
    )


def kv(tokens: int = 16, offset: int = 0) -> ParkedKv:
    return ParkedKv(extents=(Extent(offset, 4096),), tokens=tokens)


def model_status(name: str, state: str = "resident") -> ModelStatus:
    return ModelStatus(
        name=ModelName(name),
        state=state,  # type: ignore[arg-type]
        weight_granules=1,
        kv_granules=0,
        kv_pages_used=0,
        queued=0,
        running=0,
        parked=0,
        turn=True,
        switches_in=0,
        switches_out=0,
        prompt_tokens=0,
        output_tokens=0,
    )


def status(
    *,
    actions_done: int = 0,
    bytes_copied: int = 0,
    waiting: int = 0,
    models: tuple[ModelStatus, ...] = (),
) -> UnitStatus:
    return UnitStatus(
        at_ns=0,
        models=models,
        free_granules=4,
        num_granules=8,
        host_used_bytes=0,
        host_bytes=1 << 20,
        actions_done=actions_done,
        bytes_copied=bytes_copied,
        waiting=waiting,
    )

"""A hub that plays scripts: chunks, holds, refusals, failures. For tests of the frontend."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from weft.core.errors import ReplyError
from weft.core.ids import ModelName, RequestId
from weft.core.request import TokenLogprobs
from weft.core.unit import ModelStatus, UnitStatus
from weft.hub.base import (
    Chunk,
    Health,
    HubRefusal,
    ModelCard,
    NewRequest,
    PoolView,
    UnitView,
)


class Hold:
    """A step of a script that lasts until `release`, or until the request is cancelled."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._released = asyncio.Event()

    def release(self) -> None:
        self._released.set()

    async def wait(self, cancelled: asyncio.Event) -> None:
        self.reached.set()
        waits = [asyncio.ensure_future(e.wait()) for e in (self._released, cancelled)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


Step = Chunk | Hold | Exception
Script = Callable[[NewRequest], "Sequence[Step] | ReplyError"]


def tokens_of(folder: Path, text: str) -> tuple[int, ...]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def spoken(tokens: Sequence[int], *, finish: str = "stop", per_chunk: int = 1) -> list[Step]:
    """The tokens in chunks, then an empty chunk with `finish`."""
    steps: list[Step] = [
        Chunk(tokens=tuple(tokens[i : i + per_chunk])) for i in range(0, len(tokens), per_chunk)
    ]
    return [*steps, Chunk(finish=finish)]  # type: ignore[arg-type]


def logprob_of(before: int, token: int) -> float:
    """What the obliging hub says about `token` behind `before`."""
    return -((before * 7 + token * 3) % 50 + 1) / 8


def logprobs_of(before: int, token: int, top: int, *, vocab: int = 300) -> TokenLogprobs:
    ranked = sorted(range(vocab), key=lambda other: (-logprob_of(before, other), other))[:top]
    return TokenLogprobs(
        token=token,
        logprob=logprob_of(before, token),
        top=tuple((other, logprob_of(before, other)) for other in ranked),
    )


def obliging(tokens: Sequence[int], *, finish: str = "stop", per_chunk: int = 1) -> Script:
    """Says `tokens` up to max_tokens, with all the log probabilities and vectors asked for."""

    def script(new: NewRequest) -> Sequence[Step]:
        if new.embed is not None:
            values = [float(token) for token in new.prompt[:4]]
            return [Chunk(embedding=(struct.pack(f"<{len(values)}f", *values),), finish="stop")]
        said = tuple(tokens[: new.max_tokens])
        end = "length" if len(said) == new.max_tokens else finish
        whole = (*new.prompt, *said)
        first = len(new.prompt)
        asked = new.prompt_logprobs
        steps: list[Step] = []
        for i in range(0, len(said), per_chunk):
            part = said[i : i + per_chunk]
            top = new.sampling.logprobs
            own = (
                ()
                if top is None
                else tuple(
                    logprobs_of(whole[first + j - 1], whole[first + j], top)
                    for j in range(i, i + len(part))
                )
            )
            steps.append(Chunk(tokens=part, logprobs=own))
        prompt = (
            ()
            if asked is None
            else tuple(
                logprobs_of(new.prompt[j - 1], new.prompt[j], asked) for j in range(1, first)
            )
        )
        head = Chunk(prompt_logprobs=prompt, cached_tokens=first // 2)
        return [head, *steps, Chunk(finish=end)]  # type: ignore[arg-type]

    return script


class FakeHub:
    """Implements weft.hub.base.Hub. `script` decides what each request sees; a ReplyError from it
    is a refusal at `open`."""

    def __init__(self, cards: Sequence[ModelCard], script: Script) -> None:
        self.cards = tuple(cards)
        self.script = script
        self.opened: list[NewRequest] = []
        self.cancelled: list[RequestId] = []
        self.ended: list[RequestId] = []
        self.pulled = 0
        self.cancel_seen = asyncio.Event()
        self.state = Health(healthy=True, ready=True, waiting=0, since_progress_s=0.0)
        self._cancels: dict[RequestId, asyncio.Event] = {}

    def models(self) -> tuple[ModelCard, ...]:
        return self.cards

    def open(self, new: NewRequest) -> tuple[RequestId, AsyncIterator[Chunk]]:
        steps = self.script(new)
        if isinstance(steps, ReplyError):
            raise HubRefusal(steps)
        self.opened.append(new)
        request = RequestId(len(self.opened))
        self._cancels[request] = asyncio.Event()
        return request, self._play(request, steps)

    async def _play(self, request: RequestId, steps: Sequence[Step]) -> AsyncIterator[Chunk]:
        cancelled = self._cancels[request]
        for step in steps:
            if isinstance(step, Hold):
                await step.wait(cancelled)
            if cancelled.is_set():
                self.ended.append(request)
                yield Chunk(finish="cancelled")
                return
            if isinstance(step, Exception):
                raise step
            if isinstance(step, Chunk):
                self.pulled += 1
                if step.finish is not None:
                    self.ended.append(request)
                yield step

    def cancel(self, request: RequestId) -> None:
        self.cancelled.append(request)
        self.cancel_seen.set()
        self._cancels[request].set()

    def view(self) -> PoolView:
        models = tuple(
            ModelStatus(
                name=ModelName(card.name),
                state="resident" if i == 0 else "absent",
                weight_granules=3 if i == 0 else 0,
                kv_granules=1,
                kv_pages_used=5,
                queued=2,
                running=1,
                parked=4,
                turn=i == 0,
                switches_in=6,
                switches_out=5,
                prompt_tokens=100,
                output_tokens=200,
                loads_by={"request": 4, "asked": 2},
                drops_by={"room": 5},
                load_ns=3_000_000_000,
                queue_wait_ns=500_000_000,
                begun=2,
            )
            for i, card in enumerate(self.cards)
        )
        status = UnitStatus(
            at_ns=1_000_000_000,
            models=models,
            free_granules=7,
            num_granules=12,
            host_used_bytes=1 << 20,
            host_bytes=1 << 22,
            actions_done=42,
            bytes_copied=4242,
            waiting=7,
        )
        unit = UnitView(unit=0, incarnation=2, device="cpu", up=True, restarts=1, status=status)
        return PoolView(
            models=self.cards,
            units=(unit,),
            unfinished=7,
            host_store_bytes=1 << 24,
            host_store_used_bytes=1 << 23,
        )

    def health(self) -> Health:
        return self.state


def card(
    name: str,
    folder: Path,
    *,
    context: int = 512,
    vocab: int = 300,
    failed: str | None = None,
) -> ModelCard:
    return ModelCard(
        name=name,
        path=str(folder),
        created_s=1_700_000_000,
        max_context_tokens=context,
        vocab_size=vocab,
        eos_ids=(2,),
        ttft_slo_s=10.0,
        tbt_slo_s=0.1,
        failed=failed,
    )

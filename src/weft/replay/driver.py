"""The open loop: every request at its time, however many are unanswered."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence

import httpx
import msgspec

from weft.replay.client import Settings, fetch_switches, make_client, send
from weft.replay.records import ModelFacts, Planned, Record, Result
from weft.replay.summary import summaries, switches_between
from weft.workload.trace import Arrival

TEXT_BYTES_PER_TOKEN = 2
"""A prompt of n tokens as text is 2 n bytes: small vocabularies need that much for one token, so
the prompt is no longer than planned."""
FIRST_PROMPT_ID = 2
"""Prompts are drawn from here upwards: low ids are often special tokens."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a replay is."""

    total: int
    sent: int
    done: int
    failed: int
    tokens: int
    elapsed_s: float
    last_error: str | None = None


def plan_requests(
    arrivals: Sequence[Arrival],
    *,
    seed: int,
    vocab_size: int,
    text: str | None = None,
) -> list[Planned]:
    """Give every arrival a prompt: token ids uniform over the vocabulary, or a passage of `text`
    (then its length in tokens is only about what was planned)."""
    planned = []
    for index, arrival in enumerate(arrivals):
        rng = random.Random(f"weft-prompt-{seed}-{index}")
        prompt: tuple[int, ...] | str
        if text is None:
            span = range(min(FIRST_PROMPT_ID, vocab_size - 1), vocab_size)
            prompt = tuple(rng.choices(span, k=arrival.prompt_tokens))
        else:
            length = max(1, arrival.prompt_tokens * TEXT_BYTES_PER_TOKEN)
            at = rng.randrange(max(1, len(text) - length))
            prompt = text[at : at + length]
        planned.append(
            Planned(
                index=index,
                arrival_ns=arrival.arrival_ns,
                model=arrival.model,
                prompt=prompt,
                prompt_tokens=arrival.prompt_tokens,
                output_tokens=arrival.output_tokens,
            )
        )
    return planned


class _Run:
    """One replay under way."""

    def __init__(self, client: httpx.AsyncClient, settings: Settings, total: int) -> None:
        self.client, self.settings, self.total = client, settings, total
        self.began_ns = time.monotonic_ns()
        self.sent, self.tokens = 0, 0
        self.records: list[Record] = []
        self.num_failed = 0
        self.last_error: str | None = None

    def now_ns(self) -> int:
        return time.monotonic_ns() - self.began_ns

    def progress(self) -> Progress:
        return Progress(
            total=self.total,
            sent=self.sent,
            done=len(self.records),
            failed=self.num_failed,
            tokens=self.tokens,
            elapsed_s=self.now_ns() / 1e9,
            last_error=self.last_error,
        )

    def _count(self, tokens: int) -> None:
        self.tokens += tokens

    async def _one(self, planned: Planned) -> None:
        record = await send(self.client, planned, self.settings, self.now_ns, self._count)
        self.records.append(record)
        if record.error is not None:
            self.num_failed += 1
            self.last_error = f"request {record.index} to {record.model}: {record.error}"

    async def all(self, requests: Sequence[Planned]) -> bool:
        """Send everything and wait for the answers; True if it was interrupted. An interrupt
        ends the requests in flight, and those not yet sent are left out."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            for planned in requests:
                wait_ns = planned.arrival_ns - self.now_ns()
                if wait_ns > 0:
                    await asyncio.sleep(wait_ns / 1e9)
                self.sent += 1
                tasks.add(asyncio.create_task(self._one(planned)))
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return True
        return False


async def replay_requests(
    requests: Sequence[Planned],
    models: Sequence[ModelFacts],
    settings: Settings,
    *,
    workload: str,
    watch: Callable[[Progress], None],
    watch_every_s: float = 0.25,
) -> Result:
    """Replay `requests` against the server and sum up. `watch` is told of the progress."""
    async with make_client(settings) as client:
        before = await fetch_switches(client)
        run = _Run(client, settings, len(requests))

        async def tell() -> None:
            while True:
                watch(run.progress())
                await asyncio.sleep(watch_every_s)

        teller = asyncio.create_task(tell())
        try:
            interrupted = await run.all(requests)
        finally:
            teller.cancel()
        watch(run.progress())
        seconds = max((record.end_ns for record in run.records), default=0) / 1e9
        after = None if interrupted else await fetch_switches(client)
    records = sorted(run.records, key=lambda record: record.index)
    rows, total = summaries(models, records, switches_between(before, after), seconds=seconds)
    return Result(
        url=settings.base,
        workload=workload,
        seed=settings.seed,
        seconds=seconds,
        worst_send_lag_s=max((r.sent_ns - r.arrival_ns for r in records), default=0) / 1e9,
        interrupted=interrupted,
        total=total,
        models=rows,
        requests=tuple(records),
    )

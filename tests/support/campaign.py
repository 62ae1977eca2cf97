"""The campaign: six models in the memory of two, clients that come and go, blows to the worker.

A `House` is a pool in processes of its own with so much host memory for parked KV. `live_in` sends
it random requests over HTTP and kills its worker until enough switches and kills have happened;
every token that any client got is compared with the plain run of its request. What the workers did
is counted afterwards from their traces (`tally`), which survive a kill line by line.
"""

import asyncio
import json
import os
import random
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from support.answers import plain_answer, random_sampling
from support.plain import PlainModel
from support.pool_process import PoolProcess, command_line, running_pool, sse
from support.tiny import tiny_checkpoint
from weft.config.pool_config import parse_pool_config
from weft.core.actions import CopyKv, Load, Run, UnitAction
from weft.core.ids import ModelName, RequestId
from weft.core.request import Grammar, Request, Sampling
from weft.models.hf_config import read_eos_ids
from weft.node.images import plan_store
from weft.report.trace_file import read_worker_trace

VOCAB = 256
MODELS: dict[str, dict[str, Any]] = {
    "ant": {},
    "bee": {"family": "qwen2"},
    "cat": {"kv_heads": 1},
    "dog": {"family": "qwen2", "kv_heads": 4, "layers": 2},
    "elk": {"rope": "llama3"},
    "fox": {"heads": 6, "kv_heads": 1, "head_dim": 24, "tied": True},
}
DEVICE_MEMORY = "6M"
"""Every model has weights of two granules (of 1 MiB) and wants at least one for KV: two fit."""
TURN_S = 0.03
MAX_OPEN = 24
"""Clients at once."""
SILENCE_S = 90.0
"""A client that hears nothing for so long fails."""


def make_models(folder: Path) -> list[dict[str, Any]]:
    """Six checkpoints in float64, as entries of pool.yaml."""
    for seed, (name, shape) in enumerate(MODELS.items()):
        wanted = {"layers": 3, "intermediate": 256, "vocab": VOCAB, **shape}
        tiny_checkpoint(folder / name, seed=seed, dtype="float64", **wanted)
    return [{"name": name, "path": str(folder / name)} for name in MODELS]


# -- requests and their plain runs -------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """A request and the answer it must get."""

    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    ignore_eos: bool
    answer: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """One for each token of the answer, where they are asked for."""
    finish: str = ""

    def body(self, *, stream: bool) -> dict[str, Any]:
        """For POST /v1/completions."""
        sampling = self.sampling
        shape = {} if sampling.grammar is None else structured(sampling.grammar)
        return shape | {
            "model": self.model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "logit_bias": {str(token): value for token, value in sampling.logit_bias},
            "logprobs": sampling.logprobs,
            "seed": sampling.seed,
            "stop_token_ids": list(self.stop_ids),
            "ignore_eos": self.ignore_eos,
            "stream": stream,
            "return_token_ids": True,
        }


def structured(grammar: Grammar) -> dict[str, Any]:
    """As vLLM's field."""
    key, value = {
        "json_object": ("json_object", True),
        "json_schema": ("json", grammar.text),
        "regex": ("regex", grammar.text),
        "choice": ("choice", json.loads(grammar.text) if grammar.kind == "choice" else None),
        "lark": ("grammar", grammar.text),
    }[grammar.kind]
    return {"structured_outputs": {key: value}}


def draw_wishes(models: Sequence[dict[str, Any]], count: int, rng: random.Random) -> list[Wish]:
    """`count` different requests, evenly over the models, each with the answer of its plain run:
    the model alone, without scheduler or executor."""
    wishes: list[Wish] = []
    for i, model in enumerate(models):
        plain = PlainModel(Path(model["path"]))
        prefixes = [_ids(rng, n) for n in (40, 130, 200)]
        for _ in range(count * i // len(models), count * (i + 1) // len(models)):
            wishes.append(_with_answer(_draw(model["name"], rng, prefixes), plain))
    return wishes


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(6, VOCAB) for _ in range(count))


def _draw(model: str, rng: random.Random, prefixes: Sequence[tuple[int, ...]]) -> Wish:
    """Two of three prompts begin as others do. A third of the streams is greedy, a third seeded,
    and a third has all kinds of parameters."""
    prefix = rng.choice(prefixes) if rng.random() < 0.67 else ()
    sampling = Sampling()
    kind = rng.randrange(3)
    if kind == 1:
        sampling = random_sampling(rng, VOCAB)
    elif kind == 2:
        sampling = Sampling(
            temperature=rng.choice([0.5, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            seed=rng.randrange(1 << 40),
        )
    return Wish(
        model=model,
        prompt=prefix + _ids(rng, rng.randint(1, 30)),
        max_tokens=rng.choice([rng.randint(1, 16), rng.randint(20, 80)]),
        sampling=sampling,
        stop_ids=() if sampling.grammar else tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 3]))),
        ignore_eos=rng.random() < 0.5,
    )


def _with_answer(wish: Wish, plain: PlainModel) -> Wish:
    request = Request(
        id=RequestId(0),
        model=ModelName(wish.model),
        prompt=wish.prompt,
        max_tokens=wish.max_tokens,
        sampling=wish.sampling,
        stop_ids=wish.stop_ids,
        ignore_eos=wish.ignore_eos,
    )
    answer = plain_answer(plain, request, read_eos_ids(plain.path))
    return replace(
        wish,
        answer=tuple(answer.tokens),
        logprobs=tuple(one.logprob for one in answer.logprobs),
        finish=answer.finish or "",
    )


# -- a pool under fire -------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened, in numbers that add up over houses."""

    requests: int = 0
    finished: int = 0
    left: int = 0
    """Clients that went away before their answer was whole."""
    tokens: int = 0
    """Compared with the plain runs."""
    differing: int = 0
    switches: int = 0
    """Loads of weights that took effect, over all incarnations."""
    kills: int = 0
    starting: int = 0
    """Of the kills: those that met a worker before it had done anything."""
    parks: int = 0
    parks_in_answer: int = 0
    """KV parked between two tokens of an answer."""
    resumes: int = 0
    resumes_after_kill: int = 0
    """Continued from KV that an earlier incarnation had parked."""
    reruns: int = 0
    """Continued from the journal alone, in a later incarnation than they began in."""
    recomputed: int = 0
    """KV given up for want of host memory and computed again in the same incarnation."""
    found: int = 0
    """Began behind pages of the prefix cache, each in its incarnation."""
    prefix_saves: int = 0
    """Copies of the prefix cache to the host store."""
    prefix_fetches: int = 0
    """And from there."""
    seconds: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        pairs = ((f.name, getattr(self, f.name) + getattr(other, f.name)) for f in fields(self))
        return Tally(**dict(pairs))

    def __str__(self) -> str:
        return ", ".join(
            f"{f.name.replace('_', ' ')} {getattr(self, f.name):.10g}" for f in fields(self)
        )


class House:
    """A running pool and what its clients have seen so far."""

    def __init__(self, pool: PoolProcess, trace_dir: Path, images_bytes: int, parked: int) -> None:
        self.pool = pool
        self.trace_dir = trace_dir
        self.images_bytes = images_bytes
        self.parked_bytes = parked
        self.tally = Tally()
        self._killed: set[int] = set()
        self.wrong: list[str] = []
        """One line for every answer that is not its plain run's."""
        self._loads: dict[int, int] = {}

    def view(self) -> dict[str, Any]:
        """The pool in GET /weft/status."""
        pool: dict[str, Any] = httpx.get(f"{self.pool.url}/weft/status").json()["pool"]
        return pool

    def note(self, view: dict[str, Any]) -> None:
        """Remember how many models the present incarnation has loaded."""
        (unit,) = view["units"]
        if unit["status"] is not None:
            loads = sum(model["switches_in"] for model in unit["status"]["models"])
            self._loads[unit["incarnation"]] = loads

    @property
    def victim(self) -> int | None:
        """The worker's process, if one lives that was not killed yet. (The server may take one
        that has just been killed for alive.)"""
        return next((p for p in self.pool.worker_pids() if p not in self._killed), None)

    def kill(self) -> None:
        """kill -9 of the worker, which must be there."""
        victim = self.victim
        assert victim is not None, f"no worker to kill; they died of {self.deaths()}"
        os.kill(victim, signal.SIGKILL)
        self._killed.add(victim)
        self.tally.kills += 1

    def deaths(self) -> list[str]:
        """What every worker that is gone died of, from the server's log."""
        return re.findall(r"unit=\d+\.\d+ state=lost reason=(.*)", self.pool.log())

    @property
    def switches_seen(self) -> int:
        """At least so many; a worker takes its last report's successor with it."""
        return sum(self._loads.values())

    def check(
        self, wish: Wish, got: Sequence[int], scores: Sequence[float], finish: str | None
    ) -> None:
        """Compare what a client got. `finish` None: it left, and what it got is a beginning."""
        want = wish.answer if finish is not None else wish.answer[: len(got)]
        wanted = wish.logprobs[: len(got)]
        if len(scores) != len(wanted) or not np.allclose(scores, wanted, atol=1e-6, rtol=0):
            self.wrong.append(f"{wish}: got log probabilities {scores}")
        self.tally.tokens += len(got)
        self.tally.finished += finish is not None
        self.tally.left += finish is None
        same = tuple(got) == want and finish in (None, wish.finish)
        if not same:
            pairs = zip(got, wish.answer, strict=False)
            differ = sum(a != b for a, b in pairs) + abs(len(got) - len(want))
            self.tally.differing += differ
            self.wrong.append(f"{wish}: got {tuple(got)} and {finish}")


@contextmanager
def open_house(
    folder: Path, models: Sequence[dict[str, Any]], parked_bytes: int
) -> Iterator[House]:
    """A pool whose host store holds the images and `parked_bytes` of KV."""
    folder.mkdir()
    asked = parse_pool_config(json.dumps({"models": list(models)}))
    images_bytes = plan_store(asked, folder, 1 << 30).images_bytes
    with running_pool(
        folder,
        models,
        engine={
            "device_memory": DEVICE_MEMORY,
            "host_memory": str(images_bytes + parked_bytes),
            "max_rows": 8,
            "max_step_tokens": 256,
        },
        # No comment keeps a silent stream alive here: clients notice when nothing comes.
        server={"keepalive_s": 3600, "hold_s": 3600},
        turn_s=TURN_S,
        trace_dir=folder / "trace",
        main="support.campaign_main",
    ) as pool:
        pool.wait_ready()
        yield House(pool, folder / "trace", images_bytes, parked_bytes)


async def live_in(
    house: House, wishes: Sequence[Wish], rng: random.Random, *, switches: int, kills: int
) -> None:
    """Clients and blows until there were so many switches and kills and the last client is gone."""
    over = asyncio.Event()
    async with house.pool.client(SILENCE_S) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(_crowd(house, client, wishes, random.Random(rng.random()), over))
        blows = sorted(switches * (i + rng.random()) / (kills + 1) for i in range(kills))
        while house.switches_seen < switches or house.tally.kills < kills:
            await asyncio.sleep(0.02)
            view = (await client.get("/weft/status")).json()["pool"]
            house.note(view)
            done = house.tally.kills
            due = done < kills and house.switches_seen >= blows[done]
            if due and _has_worked(view) and house.victim is not None:
                await _strike(house, rng, more=kills - done - 1)
        over.set()
    house.note(house.view())


def _has_worked(view: dict[str, Any]) -> bool:
    (unit,) = view["units"]
    return unit["up"] and unit["status"] is not None and unit["status"]["actions_done"] > 0


async def _strike(house: House, rng: random.Random, *, more: int) -> None:
    """kill -9 after a random while, and now and then its successor as it starts."""
    await asyncio.sleep(rng.uniform(0.0, 0.15))
    house.kill()
    if more and rng.random() < 0.1:
        while house.victim is None:
            await asyncio.sleep(0.005)
        await asyncio.sleep(rng.uniform(0.0, 0.5))
        house.kill()
        house.tally.starting += 1


async def _crowd(
    house: House,
    client: httpx.AsyncClient,
    wishes: Sequence[Wish],
    rng: random.Random,
    over: asyncio.Event,
) -> None:
    """Clients at random times, now and then many at once for one model."""
    room = asyncio.Semaphore(MAX_OPEN)

    async def one(wish: Wish, fate: random.Random) -> None:
        try:
            await _visit(house, client, wish, fate)
        finally:
            room.release()

    async with asyncio.TaskGroup() as tasks:
        while not over.is_set():
            await asyncio.sleep(rng.expovariate(60.0))
            crowd = [rng.choice(wishes)]
            if rng.random() < 0.04:
                crowd = rng.choices([w for w in wishes if w.model == crowd[0].model], k=4)
            for wish in crowd:
                await room.acquire()
                house.tally.requests += 1
                tasks.create_task(one(wish, random.Random(rng.random())))


async def _visit(house: House, client: httpx.AsyncClient, wish: Wish, rng: random.Random) -> None:
    """One client: reads its answer to the end, whole or as a stream, or leaves: after some tokens
    or after some time, which may be before the first."""
    fate = rng.random()
    if fate < 0.15:
        response = await client.post("/v1/completions", json=wish.body(stream=False))
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        scores = choice["logprobs"]["token_logprobs"] if choice.get("logprobs") else []
        house.check(wish, choice["token_ids"], scores, choice["finish_reason"])
        return
    got: list[int] = []
    scored: list[float] = []
    finish = None
    patience_s = rng.uniform(0.0, 1.0) if fate < 0.22 else None
    enough = rng.randrange(wish.max_tokens + 1) if 0.22 <= fate < 0.30 else None
    try:
        async with asyncio.timeout(patience_s):
            finish = await _read(client, wish, got, scored, enough)
    except TimeoutError:
        pass
    house.check(wish, got, scored, finish)


async def _read(
    client: httpx.AsyncClient,
    wish: Wish,
    got: list[int],
    scores: list[float],
    enough: int | None,
) -> str | None:
    """Token ids of the stream into `got` and log probabilities into `scores`, until its end or
    until there are `enough`."""
    finish = None
    body = wish.body(stream=True)
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise AssertionError(f"{response.status_code}: {response.text}")
        async for event in sse(response):
            assert "error" not in event, event
            for choice in event["choices"]:
                assert finish is None, "something came after the end"
                got.extend(choice["token_ids"])
                if choice.get("logprobs"):
                    scores.extend(choice["logprobs"]["token_logprobs"])
                finish = choice["finish_reason"]
            if enough is not None and len(got) >= enough:
                return finish
    assert finish is not None, "no finish_reason"
    return finish


# -- what is left -------------------------------------------------------------------------------


def nothing_is_held(house: House) -> bool:
    """The last report: no request, KV page or extent in use, every granule accounted for."""
    view = house.view()
    house.note(view)
    (unit,) = view["units"]
    status = unit["status"]
    if view["unfinished"] or status is None or status["waiting"] or status["host_used_bytes"]:
        return False
    models = status["models"]
    mapped = sum(model["weight_granules"] + model["kv_granules"] for model in models)
    return (
        not any(m["kv_pages_used"] or m["queued"] or m["running"] or m["parked"] for m in models)
        and all(model["state"] in ("resident", "absent") for model in models)
        and mapped + status["free_granules"] == status["num_granules"]
    )


def cached_bytes(house: House) -> int:
    """What the prefix cache keeps in the host store."""
    (unit,) = house.view()["units"]
    return int(unit["status"]["host_cached_bytes"])


@dataclass(frozen=True)
class StoreFacts:
    """The host store's memfd as the machine sees it."""

    size_bytes: int
    resident_bytes: int
    images_digest: str


def store_facts(house: House) -> StoreFacts:
    """Through the server's descriptor of it."""
    for entry in Path(f"/proc/{house.pool.process.pid}/fd").iterdir():
        if "memfd:weft-host-store" in os.readlink(entry):
            with entry.open("rb") as file:
                stat = os.fstat(file.fileno())
                digest = blake2b(file.read(house.images_bytes)).hexdigest()
            return StoreFacts(stat.st_size, stat.st_blocks * 512, digest)
    raise AssertionError("the server holds no host store")


def workers_of(server_pid: int) -> list[int]:
    """Worker processes that this server ever started and that live, whoever their parent is."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    wanted = f"--parent {server_pid} "
    return [p for p in pids if "weft.worker" in (line := command_line(p)) and wanted in line]


# -- counting -----------------------------------------------------------------------------------


def count_traces(house: House) -> None:
    """Fill the house's tally from the traces of all incarnations."""
    ran: set[int] = set()
    for trace in sorted(house.trace_dir.glob("trace-*.jsonl"), key=_incarnation):
        _, spans = read_worker_trace(trace)
        worked = {span.id for span in spans if span.ok}
        plan = trace.with_name(trace.name.replace("trace-", "plan-"))
        ran |= _count_incarnation(house.tally, _actions(plan), worked, ran)


def _incarnation(trace: Path) -> int:
    return int(trace.stem.rpartition("-")[2])


def _actions(plan: Path) -> list[UnitAction]:
    """What was submitted; a last line cut short by the kill is passed over."""
    decoder = msgspec.json.Decoder(UnitAction)
    lines = plan.read_bytes().split(b"\n")
    return [decoder.decode(line) for line in lines[:-1]]


def _count_incarnation(
    tally: Tally, actions: Sequence[UnitAction], worked: set[int], before: set[int]
) -> set[int]:
    """Add what these actions did. Returns the requests that ran; `before`: in earlier ones."""
    ran: set[int] = set()
    drawn: set[int] = set()
    parked: set[int] = set()
    for action in actions:
        match action:
            case Load() if action.id in worked:
                tally.switches += 1
            case CopyKv(request=-1, to=to) if action.id in worked:
                tally.prefix_saves += to == "host"
                tally.prefix_fetches += to == "device"
            case CopyKv(to="host", request=request) if action.id in worked:
                tally.parks += 1
                tally.parks_in_answer += request in drawn
                parked.add(request)
            case CopyKv(to="device", request=request) if action.id in worked:
                tally.resumes += 1
                tally.resumes_after_kill += request not in ran and request not in parked
                ran.add(request)
            case Run(plan=plan):
                for row in plan.rows:
                    if row.start == 0 and row.request in ran:
                        tally.recomputed += 1
                    tally.found += row.start > 0 and row.request not in ran
                    tally.reruns += row.request in before and row.request not in ran
                    ran.add(row.request)
                    if row.sample is not None:
                        drawn.add(row.request)
    return ran

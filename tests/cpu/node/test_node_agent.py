"""Hub, node agent and worker processes together, with a unit that needs no model.

Kill -9 comes at random moments; the fake executor checks every page it resumes from.
"""

import asyncio
import errno
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from support.fake_unit import DIES_AT_ONCE, DIES_IN_COPY, DIES_LATER, PAGE_BYTES, RAISES, answer
from support.pool_cases import spec
from support.pool_process import alive, poll
from weft.core import errors
from weft.core.errors import ReplyError
from weft.core.model import Architecture, RopeSpec
from weft.engine.base import ImageRef
from weft.hub.base import HubRefusal, ModelCard, NewRequest
from weft.hub.hub import PoolHub
from weft.memory.host_store import HostStore
from weft.node.agent import NodeAgent
from weft.policy.dispatch.least_loaded import LeastLoaded
from weft.pool.scheduler import PoolScheduler
from weft.pool.units import Limits
from weft.transport.messages import BindModel, WorkerConfig

TESTS = Path(__file__).resolve().parents[2]
FAKE = (sys.executable, "-m", "support.fake_worker")

ARCH = Architecture(
    family="llama",
    num_layers=1,
    hidden_size=2,
    intermediate_size=2,
    num_q_heads=1,
    num_kv_heads=1,
    head_dim=2,
    vocab_size=1000,
    max_position=512,
    norm_eps=1e-5,
    rope=RopeSpec(),
    qkv_bias=False,
    tied_embeddings=True,
    dtype="float32",
)
CARD = ModelCard(
    name="m",
    path=".",
    created_s=0,
    max_context_tokens=512,
    vocab_size=1000,
    eos_ids=(),
    ttft_slo_s=1.0,
    tbt_slo_s=1.0,
)


@pytest.fixture(autouse=True)
def _python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent / 'src'}:{TESTS}", prepend=os.pathsep)


@asynccontextmanager
async def pool(
    *,
    command: Sequence[str] = FAKE,
    units: int = 1,
    pages: int = 3,
    limits: Limits | None = None,
    start_timeout_s: float = 30.0,
) -> AsyncIterator[tuple[PoolHub, NodeAgent]]:
    """`pages`: of parked KV per unit; few, so that they are given away all the time."""
    region = pages * PAGE_BYTES
    host = HostStore.create(region * units)
    configs = [
        WorkerConfig(
            unit=unit,
            incarnation=0,
            host_store_bytes=region * units,
            host_offset=unit * region,
            host_bytes=region,
            check=True,
        )
        for unit in range(units)
    ]
    agent = NodeAgent(host, configs, command=command, start_timeout_s=start_timeout_s)
    hub = PoolHub(PoolScheduler(LeastLoaded(), limits or Limits()), agent, hold_s=60.0)
    agent.connect(hub)
    image = ImageRef(key="k", offset=0, num_bytes=0)
    hub.add_model(CARD, BindModel(model=spec("m"), arch=ARCH, image=image))
    hub.model_ready("m")
    for unit in range(units):
        hub.add_unit(unit)
    try:
        yield hub, agent
    finally:
        hub.close()
        await agent.close()
        assert agent.pids() == ()
        host.close()


async def ask(hub: PoolHub, *prompt: int, max_tokens: int = 20) -> list[int] | ReplyError:
    """All tokens, or the error."""
    _, chunks = hub.open(NewRequest(model="m", prompt=prompt, max_tokens=max_tokens))
    tokens: list[int] = []
    async for chunk in chunks:
        tokens += chunk.tokens
        if chunk.error is not None:
            return chunk.error
    return tokens


def plain(*prompt: int, max_tokens: int = 20) -> list[int]:
    return [answer(prompt, i) for i in range(max_tokens)]


def test_requests_are_answered_by_worker_processes() -> None:
    async def scenario() -> None:
        async with pool(units=2) as (hub, agent):
            answers = await asyncio.gather(*(ask(hub, 1, i) for i in range(10)))
            assert answers == [plain(1, i) for i in range(10)]
            assert len(agent.pids()) == 2
            while not all(unit.up for unit in hub.view().units):
                await asyncio.sleep(0.001)
            assert hub.health().healthy and hub.health().ready and hub.health().waiting == 0
            view = hub.view()
            assert view.units[0].device == "fake" and view.unfinished == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("units", [1, 2])
def test_kill_9_at_random_moments_leaves_no_seam(units: int) -> None:
    rng = random.Random(units)
    prompts = [(7, i) for i in range(12)]
    limits = Limits(backoff_s=0.0, max_failures=100, max_reruns=100, max_reruns_total=100)

    async def scenario() -> None:
        async with pool(units=units, limits=limits) as (hub, agent):
            tasks = [asyncio.create_task(ask(hub, *p, max_tokens=300)) for p in prompts]
            kills = 0
            while not all(task.done() for task in tasks):
                await asyncio.sleep(rng.random() * 0.02)
                if kills < 15 and agent.pids() and hub.view().unfinished:
                    os.kill(rng.choice(agent.pids()), signal.SIGKILL)
                    kills += 1
            assert kills == 15
            assert [await task for task in tasks] == [plain(*p, max_tokens=300) for p in prompts]

    asyncio.run(scenario())


def test_a_page_that_was_overwritten_is_not_resumed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Death comes between the overwriting of a page and anything else."""
    monkeypatch.setenv(DIES_IN_COPY, "5")
    prompts = [(7, i) for i in range(10)]
    limits = Limits(backoff_s=0.0, max_failures=100, max_reruns=100, max_reruns_total=1000)

    async def scenario() -> None:
        async with pool(pages=2, limits=limits) as (hub, _):
            answers = await asyncio.gather(*(ask(hub, *p, max_tokens=20) for p in prompts))
            assert answers == [plain(*p, max_tokens=20) for p in prompts]
            assert hub.view().units[0].restarts > 0

    asyncio.run(scenario())


@pytest.mark.parametrize("poison", [DIES_AT_ONCE, DIES_LATER])
def test_a_request_that_kills_its_worker_fails_alone(poison: int) -> None:
    limits = Limits(backoff_s=0.0, max_failures=100)

    async def scenario() -> None:
        async with pool(limits=limits) as (hub, _):
            good = [asyncio.create_task(ask(hub, 5, i, max_tokens=200)) for i in range(2)]
            bad = await ask(hub, poison, 1)
            assert isinstance(bad, ReplyError) and bad.code == errors.REQUEST_FAILED
            assert "killed by signal 9" in bad.message
            assert hub.view().units[0].restarts == 3
            assert [await task for task in good] == [plain(5, i, max_tokens=200) for i in range(2)]

    asyncio.run(scenario())


def test_a_request_that_its_worker_cannot_even_take_fails_alone() -> None:
    async def scenario() -> None:
        async with pool(limits=Limits(backoff_s=0.0)) as (hub, _):
            good = [asyncio.create_task(ask(hub, 5, i, max_tokens=200)) for i in range(2)]
            bad = await ask(hub, RAISES)
            assert isinstance(bad, ReplyError) and bad.code == errors.REQUEST_FAILED
            assert "the request asked for it" in bad.message
            assert [await task for task in good] == [plain(5, i, max_tokens=200) for i in range(2)]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise SystemExit(3)", "exited with status 3"),
        ("import os; os.write(int(os.environ['FD']), b'x' * 9)", "a frame of"),
        ("import time; time.sleep(60)", "did not start within"),
    ],
    ids=["exits", "babbles", "sleeps"],
)
def test_a_worker_that_cannot_start_is_not_waited_for(
    script: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, sys; os.environ['FD'] = sys.argv[sys.argv.index('--socket-fd') + 1]; "
    command = (sys.executable, "-S", "-c", code + script)

    async def scenario() -> None:
        limits = Limits(backoff_s=0.01, max_failures=2, down_retry_s=3600.0)
        async with pool(command=command, limits=limits, start_timeout_s=0.5) as (hub, _):
            failed = await ask(hub, 1)
            assert isinstance(failed, ReplyError) and failed.code == errors.MODEL_FAILED
            assert reason in failed.message
            with pytest.raises(HubRefusal):
                hub.open(NewRequest(model="m", prompt=(1,), max_tokens=1))
            assert not hub.health().ready

    asyncio.run(scenario())


def test_a_worker_that_is_still_starting_is_not_waited_for_at_the_end() -> None:
    async def scenario() -> None:
        command = (sys.executable, "-S", "-c", "import time; time.sleep(60)")
        async with pool(command=command) as (_, agent):
            (pid,) = agent.pids()
        assert not alive(pid)

    asyncio.run(scenario())


def test_a_command_that_does_not_exist() -> None:
    async def scenario() -> None:
        limits = Limits(backoff_s=0.01, max_failures=2, down_retry_s=3600.0)
        async with pool(command=("/nowhere/weft-worker",), limits=limits) as (hub, _):
            failed = await ask(hub, 1)
            assert isinstance(failed, ReplyError) and "cannot start a worker" in failed.message

    asyncio.run(scenario())


def test_a_server_without_a_free_descriptor_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        pairs = socket.socketpair
        full = 2

        def socketpair() -> tuple[socket.socket, socket.socket]:
            nonlocal full
            full -= 1
            if full >= 0:
                raise OSError(errno.EMFILE, "Too many open files")
            return pairs()

        monkeypatch.setattr("weft.node.agent.socket.socketpair", socketpair)
        async with pool(limits=Limits(backoff_s=0.01, max_failures=9)) as (hub, _):
            tokens = await ask(hub, 1)
            assert not isinstance(tokens, ReplyError) and full < 0

    asyncio.run(scenario())


def test_a_cancelled_request_ends_and_its_unit_forgets_it() -> None:
    async def scenario() -> None:
        async with pool() as (hub, _):
            request, chunks = hub.open(NewRequest(model="m", prompt=(1,), max_tokens=400))
            await anext(chunks)
            hub.cancel(request)
            last = [chunk async for chunk in chunks][-1]
            assert last.finish == "cancelled"
            assert await ask(hub, 2) == plain(2)
            await hub.drained()

    asyncio.run(scenario())


PARENT = """
import os, socket, subprocess, sys, time
ours, theirs = socket.socketpair()
host = os.memfd_create("host")
os.ftruncate(host, 4096)
worker = subprocess.Popen(
    [sys.executable, "-m", "support.fake_worker", "--label", "orphan",
     "--socket-fd", str(theirs.fileno()), "--host-fd", str(host), "--parent", sys.argv[1] or
     str(os.getpid())],
    pass_fds=[theirs.fileno(), host])
# A copy of our end stays open elsewhere: only the parent's death can tell the worker.
os.set_inheritable(ours.fileno(), True)
keeper = subprocess.Popen([sys.executable, "-S", "-c", "input()"], close_fds=False)
print(worker.pid, flush=True)
worker.wait()
print("worker ended", flush=True)
"""


def test_a_worker_dies_with_its_parent() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, ""], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        poll(lambda: Path(f"/proc/{worker}/status").read_text().find("SigIgn") > 0, 5.0)
        assert alive(worker)
        parent.kill()
        poll(lambda: not alive(worker), 10.0)


def test_a_worker_whose_parent_is_gone_already_does_not_begin() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, "1"], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        assert parent.stdout.readline() == b"worker ended\n"
        parent.kill()

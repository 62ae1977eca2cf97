"""Templates that nothing inside the interpreter can stop, and what stops them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.fake_hub import card
from support.tiny import write_tokenizer
from weft.server.rendering import CheckpointTemplate, RenderProcesses
from weft.server.template_process import Job, frame
from weft.server.templates import ChatTemplate, TemplateFailure
from weft.server.text import TextModel

CHAT = [{"role": "user", "content": "Hi naïve 🙂"}, {"role": "assistant", "content": "x"}]
GOOD = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}{{ bos_token }}"


@pytest.fixture(scope="module")
def processes() -> Iterator[RenderProcesses]:
    processes = RenderProcesses(limit=2)
    yield processes
    processes.close()


def template(
    source: str, processes: RenderProcesses, *, limit_s: float = 0.3, max_chars: int = 10_000
) -> CheckpointTemplate:
    return CheckpointTemplate(
        source,
        tokens={"bos_token": "<s>"},
        max_chars=max_chars,
        limit_s=limit_s,
        processes=processes,
    )


def test_it_renders_as_the_plain_template_does(processes: RenderProcesses) -> None:
    plain = ChatTemplate(GOOD, tokens={"bos_token": "<s>"}, max_chars=10_000, limit_s=10.0)
    assert template(GOOD, processes, limit_s=10.0).render(CHAT) == plain.render(CHAT)
    source = "{{ tools[0].f }}{{ documents }}{{ x }}{{ add_generation_prompt }}"
    given: dict[str, Any] = {"tools": [{"f": 1}], "args": {"x": [None]}}
    rendered = template(source, processes, limit_s=10.0).render(CHAT, **given)
    assert rendered == "1None[None]True"


def test_a_number_too_large_to_send_is_refused_and_costs_no_process() -> None:
    processes = RenderProcesses(limit=1)
    own = template("{{ x }}", processes, limit_s=10.0)
    with pytest.raises(TemplateFailure, match="64 bits"):
        own.render(CHAT, args={"x": 1 << 64})
    assert not processes._idle
    assert own.render(CHAT, args={"x": (1 << 64) - 1}) == str((1 << 64) - 1)
    processes.close()


def test_a_process_that_was_killed_while_it_waited_is_nobodys_fault() -> None:
    processes = RenderProcesses(limit=1)
    own = template("{{ x }}", processes, limit_s=10.0)
    assert own.render(CHAT, args={"x": 1}) == "1"
    (waiting,) = processes._idle
    waiting._child.kill()
    waiting._child.wait()
    assert own.render(CHAT, args={"x": 2}) == "2"
    processes.close()


ENDLESS = {
    "loops that call nothing": (
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "doubling": (
        "{% set n = namespace(x='0123456789') %}{% for i in range(60) %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x | length }}"
    ),
    "adding": (
        "{% set n = namespace(x=[1, 2, 3, 4]) %}{% for i in range(60) %}"
        "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}"
    ),
    "a wide filter": "{{ 'x' | center(4000000000) }}",
    "a wide filter at compile time": "{% if false %}{{ 'x' | center(4000000000) }}{% endif %}ok",
    "a wide method": "{{ 'x'.ljust(4000000000) }}",
    "a wide format": "{{ '{:>4000000000}'.format('x') }}",
    "replacing": ("{% set x = 'a' * 1000000 %}{% set y = x.replace('a', x) %}{{ y | length }}"),
    "joining": "{{ range(99999) | join('y' * 1000000) | length }}",
    "much lorem": "{{ lipsum(n=100000000) }}",
    "an indented json": "{{ [[[1]]] | tojson(indent=4000000000) }}",
    "a slow sort": (
        "{% set r = range(99999) | list %}{% for i in r %}{% set x = r | sort(reverse=true) %}"
        "{% endfor %}"
    ),
    "a large power": "{{ (10 ** 10) ** 10 }}",
    "recursion": "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('0123456789') }}",
}


@pytest.mark.parametrize("name", sorted(ENDLESS))
def test_a_hostile_template_is_stopped(processes: RenderProcesses, name: str) -> None:
    """The one after it is served: whatever happened, happened to a process that is gone."""
    begin_s = time.monotonic()
    try:
        text = template(ENDLESS[name], processes).render(CHAT)
    except TemplateFailure as failure:
        assert len(str(failure)) < 900
    else:
        assert name == "a wide filter at compile time" and text == "ok"
    assert time.monotonic() - begin_s < 30
    assert template(GOOD, processes, limit_s=10.0).render(CHAT).endswith("<s>")


def test_the_server_does_not_grow_with_a_template(processes: RenderProcesses) -> None:
    """One gigabyte in the child is none here."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    for _ in range(3):
        with pytest.raises(TemplateFailure):
            template("{{ 'x'.ljust(1000000000) }}", processes, limit_s=5.0).render(CHAT)
    assert resident() - before < 50 << 20


def test_a_stuck_template_does_not_stop_another_model(processes: RenderProcesses) -> None:
    stuck = template(ENDLESS["loops that call nothing"], processes, limit_s=1.0)
    good = template(GOOD, processes, limit_s=10.0)
    with ThreadPoolExecutor(2) as threads:
        job = threads.submit(stuck.render, CHAT)
        for _ in range(20):
            assert good.render(CHAT)
        with pytest.raises(TemplateFailure, match="too long"):
            job.result()


def test_the_process_has_no_environment_and_few_rights(tmp_path: Path) -> None:
    """Should the sandbox be escaped, there is nothing to find."""
    from weft.server import rendering

    process = rendering._Process()
    try:
        pid = process._child.pid
        names = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found = {name.partition(b"=")[0].decode() for name in names if name}
        assert found <= {*rendering._KEPT_ENVIRONMENT, "PYTHONPATH"}
        assert len(os.listdir(f"/proc/{pid}/fd")) == 3
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert "Max file size             0 " in limits
        assert "Max address space         805306368" in limits
    finally:
        process.kill()


def test_a_stuck_orphan_ends_by_itself() -> None:
    """Its alarm rings also when nobody is left to kill it."""
    loops = 12
    source = "{% set r = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] %}"
    source += "{% for i in r %}" * loops + "{% endfor %}" * loops
    job = Job(
        source=source,
        tokens={},
        max_chars=10,
        limit_s=-1.5,
        messages=[],
        tools=[],
        documents=[],
        args={},
        add_generation_prompt=True,
    )
    import msgspec

    command = [sys.executable, "-m", "weft.server.template_process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        assert child.stdin is not None
        child.stdin.write(frame(msgspec.msgpack.encode(job)))
        child.stdin.flush()
        assert child.wait(30) == -signal.SIGALRM


def test_a_model_with_a_hostile_template_answers_400(tmp_path: Path) -> None:
    from support.fake_hub import FakeHub, spoken
    from support.live import asgi_client

    write_tokenizer(tmp_path, 300)
    file = tmp_path / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), "chat_template": "{{ 'x' | center(4000000000) }}"}
    file.write_text(json.dumps(config))
    assert TextModel(card("m", tmp_path)).has_template  # nothing of it runs when it is read
    hub = FakeHub([card("m", tmp_path)], lambda _: spoken([9]))

    async def scenario() -> None:
        async with asgi_client(hub) as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
            reply = await client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 400
            assert "chat template" in reply.json()["error"]["message"]
            assert (await client.get("/health")).status_code == 200

    asyncio.run(scenario())

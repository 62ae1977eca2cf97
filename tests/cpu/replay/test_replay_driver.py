"""The whole replay: open loop, interruption, summing up, the command."""

import asyncio
import json
from collections.abc import AsyncIterator
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from support.fake_openai import FakeOpenAI, event, whole_answer
from weft.core.errors import WeftError
from weft.replay import cli
from weft.replay.client import Settings
from weft.replay.driver import Progress, plan_requests, replay_requests
from weft.replay.progress import watching
from weft.replay.records import Counter, ModelFacts, Piece, Record, Result
from weft.replay.summary import slo_of, summaries, switches_between
from weft.report.tables import HEADINGS, failure_lines, replay_table, seconds_text
from weft.workload.trace import Arrival

S = 1_000_000_000


def arrivals(num: int, model: str = "a") -> list[Arrival]:
    return [
        Arrival(arrival_ns=0, model=model, prompt_tokens=3, output_tokens=4) for _ in range(num)
    ]


def run(
    server: FakeOpenAI, num: int, models: tuple[str, ...] = ("a",)
) -> tuple[Result, list[Progress]]:
    seen: list[Progress] = []
    requests = plan_requests(arrivals(num), seed=0, vocab_size=50)
    result = asyncio.run(
        replay_requests(
            requests,
            [ModelFacts(name=name) for name in models],
            Settings(url=server.url),
            workload="test",
            watch=seen.append,
        )
    )
    return result, seen


def test_requests_are_sent_however_many_are_unanswered() -> None:
    """The server answers nobody before it has heard from all."""
    everyone: list[asyncio.Event] = []
    waiting: list[object] = []

    async def patient(body: dict[str, Any]) -> AsyncIterator[bytes]:
        if not everyone:
            everyone.append(asyncio.Event())
        waiting.append(body)
        if len(waiting) == 20:
            everyone[0].set()
        await everyone[0].wait()
        async for piece in whole_answer(body):
            yield piece

    with FakeOpenAI(patient) as server:
        result, seen = run(server, 20)
    assert result.total.failures == 0
    assert result.total.output_tokens == 80
    assert seen[-1].done == seen[-1].total == 20
    assert seen[-1].tokens == 80
    assert [record.index for record in result.requests] == list(range(20))


def test_failures_are_counted_and_explained() -> None:
    async def moody(body: dict[str, Any]) -> AsyncIterator[bytes]:
        if body["seed"] % 2:
            yield event("half", tokens=2)
        else:
            async for piece in whole_answer(body):
                yield piece

    with FakeOpenAI(moody) as server:
        result, _ = run(server, 6, models=("a", "b"))
    assert [(row.model, row.requests, row.failures) for row in result.models] == [
        ("a", 6, 3),
        ("b", 0, 0),
    ]
    assert result.total.slo_request == 0.5
    assert result.total.switches_in is None
    assert failure_lines(result.requests) == ["3 x the stream broke off (first: request 1 to a)"]
    assert cli.exit_code(result) == 1


def test_an_interrupt_ends_the_requests_in_flight_and_still_sums_up() -> None:
    async def endless(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield event("a", tokens=1)
        await asyncio.Event().wait()

    async def main(url: str) -> Result:
        begun = asyncio.Event()

        def watch(progress: Progress) -> None:
            if progress.tokens == 3:
                begun.set()

        replaying = asyncio.create_task(
            replay_requests(
                plan_requests(arrivals(3), seed=0, vocab_size=50),
                [ModelFacts(name="a")],
                Settings(url=url),
                workload="test",
                watch=watch,
                watch_every_s=0.01,
            )
        )
        await begun.wait()
        replaying.cancel()
        return await replaying

    with FakeOpenAI(endless) as server:
        result = asyncio.run(main(server.url))
    assert result.interrupted
    assert [record.error for record in result.requests] == ["interrupted"] * 3
    assert [record.output_tokens for record in result.requests] == [1, 1, 1]
    assert cli.exit_code(result) == 130


def record(index: int, model: str, times_s: list[float], error: str | None = None) -> Record:
    return Record(
        index=index,
        model=model,
        arrival_ns=S,
        sent_ns=S,
        end_ns=20 * S,
        prompt_tokens=10,
        asked_tokens=4,
        pieces=tuple(Piece(round((1 + t) * S), 1) for t in times_s),
        finish="length",
        error=error,
    )


def test_summary_figures() -> None:
    facts = [ModelFacts(name="a", ttft_slo_s=2, tbt_slo_s=1), ModelFacts(name="b")]
    records = [
        record(0, "a", [1, 2, 3, 4]),
        record(1, "a", [3, 3.5, 4, 4.5]),
        record(2, "a", [1], error="broken"),
        record(3, "b", [9, 9.05]),
    ]
    switches = {"a": Counter(switches_in=3, switches_out=2)}
    (a, b), total = summaries(facts, records, switches, seconds=10)
    assert (a.requests, a.failures, a.output_tokens, a.tokens_per_s) == (3, 1, 9, 0.9)
    assert (a.ttft_p50_s, a.tbt_p50_s) == (2.0, 0.75)
    assert a.ttft_p99_s == pytest.approx(2.98)
    assert a.slo_request == pytest.approx(1 / 3)
    assert a.slo_strict == pytest.approx((1 + 2 / 4 + 0) / 3)
    assert (a.switches_in, b.switches_in, total.switches_in, total.switches_out) == (3, 0, 3, 2)
    assert (b.ttft_slo_s, b.slo_request) == (10.0, 1.0)
    assert (total.requests, total.ttft_slo_s) == (4, None)


def test_defaults_where_the_server_tells_no_objectives() -> None:
    assert slo_of(None) == slo_of(ModelFacts(name="x"))
    assert slo_of(ModelFacts(name="x")).tbt_ns == S // 10


def test_switches_survive_a_restarted_unit() -> None:
    before = {"a": Counter(switches_in=5, switches_out=4), "b": Counter(switches_in=9)}
    after = {"a": Counter(switches_in=8, switches_out=6), "b": Counter(switches_in=2)}
    assert switches_between(before, after) == {
        "a": Counter(switches_in=3, switches_out=2),
        "b": Counter(switches_in=2, switches_out=0),
    }
    assert switches_between(None, after) is None


def test_prompts_repeat_by_seed_and_stay_in_the_vocabulary() -> None:
    first = plan_requests(arrivals(5), seed=1, vocab_size=7)
    assert first == plan_requests(arrivals(5), seed=1, vocab_size=7)
    assert first != plan_requests(arrivals(5), seed=2, vocab_size=7)
    assert all(2 <= token < 7 for request in first for token in request.prompt)
    passages = plan_requests(arrivals(5), seed=1, vocab_size=7, text="abcdefghij")
    assert all(request.prompt in "abcdefghij" for request in passages)
    assert len(passages[0].prompt) == 6


def test_plain_progress_prints_few_lines() -> None:
    out = StringIO()
    with watching(Console(file=out, width=100)) as watch:
        for i in range(101):
            watch(Progress(total=10, sent=10, done=i // 10, failed=0, tokens=i, elapsed_s=i / 10))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert "10/10 done, 0 open, 0 failed" in lines[-1]


TRACE = "timestamp,model,prompt_tokens,output_tokens\n" + "".join(
    f"{i / 1000},{'code' if i % 2 else 'chat'},{100 + i},{20 + i}\n" for i in range(30)
)
STATUS = [
    {"pool": {"models": [], "units": [{"status": {"models": [{"name": "b", "switches_in": n}]}}]}}
    for n in (1, 1, 6)
]


def invoke(args: list[str]) -> tuple[int, str, BaseException | None]:
    app = typer.Typer()
    app.command()(cli.replay)
    outcome = CliRunner().invoke(app, args)
    return outcome.exit_code, outcome.output, outcome.exception


def test_the_command_replays_a_trace_prints_the_table_and_writes_the_results(
    tmp_path: Path,
) -> None:
    trace, out = tmp_path / "trace.csv", tmp_path / "deep" / "result.json"
    trace.write_text(TRACE)
    with FakeOpenAI() as server:
        server.pages["/weft/status"] = list(STATUS)
        code, output, _ = invoke(
            [str(trace), "--url", server.url, "--limit", "20", "--speed", "2", "--out", str(out)]
        )
        bodies = server.bodies
    assert code == 0, output
    for heading in HEADINGS:
        assert heading in output
    assert "trace.csv: 20 requests of 2 services, time x 2" in output
    result = msgspec.json.decode(out.read_bytes(), type=Result)
    assert result.format == "weft-replay-1"
    assert (result.total.requests, result.total.failures) == (20, 0)
    assert {row.model: row.switches_in for row in result.models} == {"a": 0, "b": 5}
    assert all(len(body["prompt"]) + body["max_tokens"] <= 64 for body in bodies)
    assert {body["model"] for body in bodies} == {"a", "b"}
    assert result.requests[0].token_ns()
    assert len(json.loads(out.read_text())["requests"]) == 20


def test_the_command_generates_arrivals() -> None:
    with FakeOpenAI() as server:
        code, output, _ = invoke(
            (
                f"--url {server.url} --rate 500 --requests 5 --models b "
                "--prompt-tokens 5-9 --output-tokens 3"
            ).split()
        )
        assert code == 0, output
        assert {body["max_tokens"] for body in server.bodies} == {3}
        assert all(5 <= len(body["prompt"]) <= 9 for body in server.bodies)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "not both"),
        (["nowhere.csv"], "cannot be read"),
        (["--rate", "1", "--prompt-tokens", "many"], "LOW-HIGH"),
        (["--rate", "1", "--out", "/proc/no/such.json"], "--out /proc/no/such.json"),
        (["--rate", "1", "--models", "zebra"], "not served: zebra; served: a, b"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_a_line(args: list[str], message: str) -> None:
    with FakeOpenAI() as server:
        _, _, error = invoke([*args, "--url", server.url])
    assert isinstance(error, WeftError)
    assert message in str(error)


def test_times_are_written_in_the_unit_that_suits() -> None:
    assert [seconds_text(t) for t in (None, 0.00421, 0.25, 3.14159, 250.4)] == [
        "-",
        "4.21 ms",
        "250 ms",
        "3.14 s",
        "250 s",
    ]


def test_the_table_has_a_row_a_model_and_one_over_all() -> None:
    with FakeOpenAI() as server:
        result, _ = run(server, 2, models=("a", "b"))
    assert replay_table(result).row_count == 3


@pytest.mark.parametrize("columns", [80, 132])
def test_the_table_fits_its_terminal(columns: int) -> None:
    facts = [ModelFacts(name="speaker")]
    many = [record(i, "speaker", [1.23456, 1.34567, 99.123]) for i in range(1234)]
    switches = {"speaker": Counter(switches_in=862, switches_out=862)}
    rows, total = summaries(facts, many, switches, seconds=7.3)
    result = Result(
        url="",
        workload="",
        seed=0,
        seconds=7.3,
        worst_send_lag_s=0,
        interrupted=False,
        total=total,
        models=rows,
        requests=tuple(many),
    )
    out = StringIO()
    Console(file=out, width=columns).print(replay_table(result, columns))
    assert "\N{HORIZONTAL ELLIPSIS}" not in out.getvalue()
    assert "speaker" in out.getvalue()

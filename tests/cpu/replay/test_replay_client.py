"""One request: how tokens are counted, and that every fault becomes a record's error."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fake_openai import DONE, FakeOpenAI, event
from weft.core.errors import WeftError
from weft.replay.client import (
    Settings,
    explain,
    fetch_models,
    fetch_switches,
    make_client,
    send,
)
from weft.replay.records import Counter, ModelFacts, Piece, Planned, Record, spread_evenly


def planned(output_tokens: int = 6) -> Planned:
    return Planned(
        index=4,
        arrival_ns=0,
        model="a",
        prompt=(5, 6, 7),
        prompt_tokens=3,
        output_tokens=output_tokens,
    )


def ask(
    pieces: Sequence[bytes], *, status: int = 200, extensions: bool = True, want: int = 6
) -> tuple[Record, list[int], dict[str, Any]]:
    """(the record, tokens told as they came, the posted body). The clock counts its readings."""

    async def answer(_: dict[str, Any]) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def main(url: str) -> tuple[Record, list[int]]:
        settings = Settings(url=url, extensions=extensions, seed=10)
        clock, told = itertools.count(1), []
        async with make_client(settings) as client:
            record = await send(
                client, planned(want), settings, lambda: next(clock) * 1000, told.append
            )
        return record, told

    with FakeOpenAI(answer, status) as server:
        record, told = asyncio.run(main(server.url))
        return record, told, server.bodies[0]


def test_an_event_of_several_tokens_is_one_gap_and_zero_gaps() -> None:
    record, told, body = ask(
        [
            b": still waiting\n\n",
            event("a", tokens=1),
            event("b c d", tokens=4),
            event("e f", tokens=6, finish="length"),
            event(tokens=6, prompt_tokens=99),
            DONE,
        ]
    )
    assert record.error is None
    assert [piece.tokens for piece in record.pieces] == [1, 3, 2]
    times = record.token_ns()
    assert len(times) == 6
    assert times[1] == times[2] == times[3] < times[4] == times[5]
    assert record.prompt_tokens == 99
    assert sum(told) == 6
    assert body["prompt"] == [5, 6, 7]
    assert body["seed"] == 14
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_a_final_usage_alone_is_spread_evenly() -> None:
    pieces = [event("a"), event("b"), event("c"), event("", finish="stop"), event(tokens=7), DONE]
    record, _, body = ask(pieces, extensions=False)
    assert record.error is None
    assert [piece.tokens for piece in record.pieces] == [2, 2, 3]
    assert "ignore_eos" not in body
    assert body["stream_options"] == {"include_usage": True}


def test_without_any_usage_an_event_with_text_is_a_token() -> None:
    record, told, _ = ask([event("a"), event("b", finish="stop"), DONE], extensions=False)
    assert record.error is None
    assert record.output_tokens == 2
    assert sum(told) == 2


def test_tokens_without_text_are_not_lost() -> None:
    pieces = [event("", tokens=1), event("", tokens=2, finish="length"), event(tokens=3), DONE]
    record, _, _ = ask(pieces, want=3)
    assert record.error is None
    assert [piece.tokens for piece in record.pieces] == [1, 1, 1]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([event("a", tokens=1)], "broke off"),
        ([event("a", tokens=6), DONE], "no finish_reason"),
        ([event("a", tokens=5, finish="length"), DONE], "5 tokens came, 6 were asked for"),
        ([event("a", tokens=6, finish="error"), DONE], "finished with 'error'"),
        ([event("a", tokens=1), b"data: {nonsense\n\n", DONE], "not an event"),
        (
            [event("a", tokens=1), b'data: {"error": {"code": "c", "message": "m"}}\n\n', DONE],
            "^c: m$",
        ),
    ],
)
def test_every_way_a_stream_can_fall_short(pieces: list[bytes], message: str) -> None:
    record, _, _ = ask(pieces)
    assert record.error is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(record.error)
    assert record.outcome().failed
    assert record.outcome().expected_tokens == 6


def test_http_errors_carry_status_and_reason() -> None:
    refusal = b'{"error": {"code": "queue_full", "message": "come back later"}}'
    record, _, _ = ask([refusal], status=429)
    assert record.error == "429 queue_full: come back later"
    record, _, _ = ask([b"<html>bad gateway"], status=502)
    assert record.error == "502 <html>bad gateway"


def test_no_server_is_an_error_of_the_record() -> None:
    with FakeOpenAI() as server:
        url = server.url

    async def main() -> Record:
        settings = Settings(url=url + "/v1/")
        async with make_client(settings) as client:
            return await send(client, planned(), settings, lambda: 0, lambda _: None)

    record = asyncio.run(main())
    assert record.error is not None
    assert record.error.startswith("ConnectError")


def test_explain_takes_whatever_servers_send() -> None:
    assert explain({"error": {"type": "t", "message": "m"}}) == "t: m"
    assert explain({"error": "plain"}) == "{'error': 'plain'}"
    assert explain("x" * 999) == "x" * 300


@given(st.lists(st.integers(0, 10**9), max_size=20).map(sorted), st.integers(0, 500))
def test_spreading_keeps_the_total(times: list[int], total: int) -> None:
    pieces = spread_evenly(times, total)
    assert [piece.at_ns for piece in pieces] == times
    if times:
        tokens = [piece.tokens for piece in pieces]
        assert sum(tokens) == total
        assert max(tokens) - min(tokens) <= 1


STATUS = {
    "pool": {
        "models": [{"name": "b", "vocab_size": 300, "ttft_slo_s": 2.0, "tbt_slo_s": 0.5}],
        "units": [
            {"status": None},
            {"status": {"models": [{"name": "b", "switches_in": 2, "switches_out": 1}]}},
            {"status": {"models": [{"name": "b", "switches_in": 3, "switches_out": 3}]}},
        ],
    }
}


def test_models_and_switches_as_the_server_tells() -> None:
    async def main(url: str) -> tuple[list[ModelFacts], dict[str, Counter] | None]:
        async with make_client(Settings(url=url)) as client:
            return await fetch_models(client), await fetch_switches(client)

    with FakeOpenAI() as server:
        server.pages["/weft/status"] = [STATUS]
        models, switches = asyncio.run(main(server.url))
    assert models == [
        ModelFacts(name="a"),
        ModelFacts(name="b", max_context_tokens=64, vocab_size=300, ttft_slo_s=2.0, tbt_slo_s=0.5),
    ]
    assert switches == {"b": Counter(switches_in=5, switches_out=4)}


def test_another_server_has_no_switches_and_no_server_is_said_so() -> None:
    async def main(url: str) -> dict[str, Counter] | None:
        async with make_client(Settings(url=url)) as client:
            return await fetch_switches(client)

    async def list_models(url: str) -> None:
        async with make_client(Settings(url=url)) as client:
            await fetch_models(client)

    with FakeOpenAI() as server:
        assert asyncio.run(main(server.url)) is None
        server.pages["/v1/models"] = ["hello"]
        with pytest.raises(WeftError, match="is the server up"):
            asyncio.run(list_models(server.url))


def test_pieces_are_compact_in_json() -> None:
    assert Piece(5, 2) == Piece(at_ns=5, tokens=2)

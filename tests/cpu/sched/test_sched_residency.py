"""Weights that come and go without a request: preload, keep-alive, load, unload, failed binds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.actions import Drop, Load
from weft.core.events import Assign, BindFailed, Pin, Submit, Unassign, Unload, Warm
from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import Request
from weft.core.unit import UnitSpec
from weft.sim.scenario import Body, Outcome, Scenario, random_scenario, run_scenario

KIB = 1024
MS = 1_000_000


def model(name: str, *, granules: int = 4, **changes: object) -> ModelSpec:
    values: dict[str, object] = {
        "name": ModelName(name),
        "weight_bytes": granules * 64 * KIB,
        "num_layers": 2,
        "page_tokens": 4,
        "page_bytes": 4 * KIB,
        "max_context_tokens": 256,
        "vocab_size": 50,
    }
    return ModelSpec(**{**values, **changes})  # type: ignore[arg-type]


def request(i: int, name: str, *, at_ns: int = 0, tokens: int = 8) -> Submit:
    return Submit(
        request=Request(
            id=RequestId(i),
            model=ModelName(name),
            prompt=(1, 2, 3),
            max_tokens=tokens,
            arrival_ns=at_ns,
        )
    )


def scenario(models: list[ModelSpec], events: list[tuple[int, object]]) -> Scenario:
    unit = UnitSpec(
        granule_bytes=64 * KIB,
        num_granules=12,
        host_bytes=8 << 20,
        num_slots=16,
        max_rows=8,
        max_step_tokens=32,
    )
    assigns = [(0, Assign(model=m)) for m in models]
    return Scenario(unit=unit, models=models, arrivals=[*assigns, *events], turn_s=0.02)  # type: ignore[list-item]


def run(models: list[ModelSpec], *events: tuple[int, object]) -> tuple[Outcome, Body]:
    """To the moment at which nothing happens any more; the ends of run_scenario are not in it."""
    the_scenario = scenario(models, list(events))
    run_scenario(the_scenario)
    body = Body(the_scenario)
    body.run(the_scenario.arrivals)
    return body.outcome, body


def moves(outcome: Outcome) -> list[tuple[str, str, str]]:
    return [(m.model, m.state, m.cause) for m in outcome.moved if m.state != "loading"]


def states(body: Body) -> dict[str, str]:
    return {m.name: m.state for m in body.scheduler.status().models}


def test_a_preloaded_model_comes_without_a_request_and_gives_way() -> None:
    a, b = model("a", granules=8, preload=True), model("b", granules=8)
    outcome, body = run([a, b], (50 * MS, request(0, "b", at_ns=50 * MS)))
    assert moves(outcome) == [
        ("a", "resident", "preload"),
        ("a", "absent", "room"),
        ("b", "resident", "request"),
    ]
    assert states(body) == {"a": "absent", "b": "resident"}, "preloaded once, not for ever"


def test_preloaded_models_do_not_drive_each_other_out() -> None:
    models = [model(n, granules=5, preload=True) for n in "abc"]
    outcome, body = run(models)
    assert states(body) == {"a": "resident", "b": "resident", "c": "absent"}
    assert not any(isinstance(x, Drop) for _, x in outcome.trace)


@pytest.mark.parametrize(("keep_alive_s", "at_ms"), [(0.0, 0), (0.05, 50)])
def test_an_idle_model_leaves_when_its_time_is_up(keep_alive_s: float, at_ms: int) -> None:
    outcome, body = run([model("a", keep_alive_s=keep_alive_s)], (0, request(0, "a")))
    dropped_ns = next(t for t, x in outcome.trace if isinstance(x, Drop))
    assert dropped_ns == outcome.ended_ns + at_ms * MS
    assert moves(outcome)[-1] == ("a", "absent", "keep_alive")
    assert states(body) == {"a": "absent"}


def test_a_request_in_time_keeps_the_model() -> None:
    events = [(i * 40 * MS, request(i, "a", at_ns=i * 40 * MS)) for i in range(5)]
    outcome, _ = run([model("a", keep_alive_s=0.05)], *events)
    assert sum(isinstance(x, Load) for _, x in outcome.trace) == 1
    assert sum(isinstance(x, Drop) for _, x in outcome.trace) == 1


def test_the_time_to_live_begins_with_the_first_request() -> None:
    outcome, body = run([model("a", keep_alive_s=0.0, preload=True)])
    assert states(body) == {"a": "resident"} and not outcome.finish


def test_a_pinned_model_has_no_time_to_live() -> None:
    _, body = run([model("a", keep_alive_s=0.0, pinned=True)], (0, request(0, "a")))
    assert states(body) == {"a": "resident"}


def test_load_takes_room_from_idle_models_only() -> None:
    a, b, c = model("a", granules=6), model("b", granules=4), model("c", granules=8)
    events = [
        (0, request(0, "a", tokens=150)),
        (0, Warm(model=ModelName("b"))),
        (30 * MS, Warm(model=ModelName("c"))),
    ]
    outcome, body = run([a, b, c], *events)
    assert ("b", "resident", "asked") in moves(outcome)
    came_ns = next(t for t, x in outcome.trace if isinstance(x, Load) and x.model == "c")
    assert came_ns >= outcome.ended_ns, "a had work until then"
    assert states(body)["c"] == "resident"


def test_unload_waits_for_the_work_and_the_next_request_brings_it_back() -> None:
    events = [
        (0, request(0, "a", tokens=60)),
        (20 * MS, Unload(model=ModelName("a"))),
        (3000 * MS, request(1, "a", at_ns=3000 * MS)),
    ]
    outcome, body = run([model("a")], *events)
    assert outcome.finish == {0: "length", 1: "length"}
    assert moves(outcome) == [
        ("a", "resident", "request"),
        ("a", "absent", "asked"),
        ("a", "resident", "request"),
    ]
    assert states(body) == {"a": "resident"}, "asked once, not for ever"


def test_unload_leaves_a_pinned_model_until_it_is_unpinned() -> None:
    a = model("a", pinned=True)
    _, body = run([a], (0, request(0, "a")), (900 * MS, Unload(model=a.name)))
    assert states(body) == {"a": "resident"}
    events = [
        (0, request(0, "a")),
        (900 * MS, Pin(model=a.name, pinned=False)),
        (901 * MS, Unload(model=a.name)),
    ]
    _, body = run([a], *events)
    assert states(body) == {"a": "absent"}


def test_a_failed_bind_is_told_to_clients_and_undone_by_the_next_assignment() -> None:
    a = model("a")
    events = [
        (0, BindFailed(model=a.name, reason="no room for its tables")),
        (1 * MS, request(0, "a")),
        (2 * MS, Assign(model=a)),
        (3 * MS, request(1, "a", at_ns=3 * MS)),
    ]
    outcome, _ = run([a], *events)
    assert outcome.errors[RequestId(0)] == "model_failed: no room for its tables"
    assert outcome.finish[RequestId(1)] == "length"
    assert outcome.moved[0].state == "failed"


def test_the_accounts_of_a_switch() -> None:
    a = model("a", keep_alive_s=0.0)
    outcome, body = run([a], (0, request(0, "a")), (2000 * MS, request(1, "a", at_ns=2000 * MS)))
    status = body.scheduler.status().models[0]
    assert status.loads_by == {"request": 2} and status.drops_by == {"keep_alive": 2}
    assert status.load_bytes == 2 * a.weight_bytes
    came = [m for m in outcome.moved if m.state == "resident"]
    assert status.load_ns == sum(m.duration_ns for m in came) > 0
    assert status.begun == 2 and status.queue_wait_ns >= 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 40))
def test_nobody_overstays_and_every_move_is_told(seed: int) -> None:
    the_scenario = random_scenario(seed)
    body = Body(the_scenario)
    body.run(the_scenario.arrivals)
    residents = body.scheduler._mover.residents
    assert residents.to_leave() == [] and residents.next_ns() is None
    again = {e.model for _, e in the_scenario.arrivals if isinstance(e, Unassign)}
    for status in body.scheduler.status().models:
        if status.name in again:
            continue  # forgotten and assigned again: it counts anew
        told = [m.state for m in body.outcome.moved if m.model == status.name]
        assert told.count("resident") == status.switches_in == sum(status.loads_by.values())
        assert told.count("absent") == status.switches_out == sum(status.drops_by.values())
        assert "" not in status.loads_by and "" not in status.drops_by

"""Adapters on a shared base: together in a step, in and out while serving, and alone in trouble."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.actions import Drop, Load, Run, UnitAction
from weft.core.events import Assign, Submit, Unassign
from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import Request
from weft.core.unit import UnitSpec
from weft.policy.presets import preset
from weft.sched.book import Book, ModelEntry, RequestState
from weft.sched.moves import Mover
from weft.sched.prefix import PrefixCache
from weft.sim.adapter_scenario import adapter_scenario
from weft.sim.scenario import Body, Outcome, Scenario, random_scenario, run_scenario

KIB = 1024
MS = 1_000_000


def base(name: str = "b", *, granules: int = 4) -> ModelSpec:
    return ModelSpec(
        name=ModelName(name),
        weight_bytes=granules * 64 * KIB,
        num_layers=2,
        page_tokens=4,
        page_bytes=4 * KIB,
        max_context_tokens=256,
        vocab_size=50,
    )


def adapter(name: str, of: ModelSpec, *, granules: int = 1, pinned: bool = False) -> ModelSpec:
    return msgspec.structs.replace(
        of,
        name=ModelName(name),
        base=of.name,
        weight_bytes=granules * 64 * KIB,
        pinned=pinned,
    )


def ask(
    i: int, model: str, adapter: str | None = None, *, at_ns: int = 0, tokens: int = 8
) -> tuple[int, Submit]:
    request = Request(
        id=RequestId(i),
        model=ModelName(model),
        adapter=None if adapter is None else ModelName(adapter),
        prompt=tuple(range(1, 7)),
        max_tokens=tokens,
        arrival_ns=at_ns,
    )
    return at_ns, Submit(request=request)


def scenario(
    models: list[ModelSpec],
    events: list[tuple[int, object]],
    *,
    granules: int = 12,
    turn_s: float = 0.1,
) -> Scenario:
    unit = UnitSpec(
        granule_bytes=64 * KIB,
        num_granules=granules,
        host_bytes=8 << 20,
        num_slots=16,
        max_rows=8,
        max_step_tokens=64,
    )
    assigns = [(0, Assign(model=m)) for m in models]
    return Scenario(unit=unit, models=models, arrivals=[*assigns, *events], turn_s=turn_s)  # type: ignore[list-item]


def failing(one: Scenario, broken: Callable[[UnitAction], bool]) -> Outcome:
    """Run it with these actions failing."""
    body = Body(one)
    start = body.executor._start

    def fail(queue: str, action: UnitAction) -> None:
        start(queue, action)
        active = body.executor._busy[queue]
        if active is not None and active.action is action and broken(action):
            active.fail_at = 0

    body.executor._start = fail  # type: ignore[method-assign]
    body.run(one.arrivals)
    return body.outcome


def test_three_adapters_and_the_bare_base_share_a_step() -> None:
    b = base()
    adapters = [adapter(name, b) for name in ("x", "y", "z")]
    events = [ask(0, "b", tokens=60)]
    events += [ask(i, "b", name, tokens=60) for i, name in enumerate(("x", "y", "z"), 1)]
    outcome = run_scenario(scenario([b, *adapters], events))
    steps = [x for _, x in outcome.trace if isinstance(x, Run)]
    assert any(len({row.adapter for row in step.plan.rows}) == 4 for step in steps)
    assert set(outcome.finish.values()) == {"length"}
    assert len({tuple(tokens) for tokens in outcome.streams.values()}) == 4


def test_a_request_whose_adapter_is_on_its_way_holds_nobody_up() -> None:
    b = base()
    slow = adapter("x", b, granules=4)
    events = [ask(0, "b", tokens=100), ask(1, "b", "x", at_ns=200 * MS)]
    events += [ask(2, "b", at_ns=200 * MS)]
    one = scenario([b, slow], events)
    one.cost = msgspec.structs.replace(one.cost, link_bytes_per_s=1e6)
    outcome = run_scenario(one)
    load = next(x for _, x in outcome.trace if isinstance(x, Load) and x.model == "x")
    assert load
    assert outcome.first_token_ns[RequestId(2)] < outcome.first_token_ns[RequestId(1)]


def test_the_first_step_follows_the_load_of_the_base_though_it_has_an_adapter() -> None:
    b = base(granules=6)
    outcome = run_scenario(scenario([b, adapter("x", b)], [ask(0, "b", "x")]))
    loads = {x.model: x for _, x in outcome.trace if isinstance(x, Load)}
    first = next(x for _, x in outcome.trace if isinstance(x, Run))
    assert loads["x"].id < loads["b"].id
    assert first.follow == loads["b"].id


def test_a_failed_adapter_load_fails_only_its_requests() -> None:
    b = base()
    events = [ask(0, "b"), ask(1, "b", "x"), ask(2, "b", "y"), ask(3, "b", "x", at_ns=900 * MS)]
    one = scenario([b, adapter("x", b), adapter("y", b)], events)
    outcome = failing(one, lambda action: isinstance(action, Load) and action.model == "x")
    assert outcome.finish == {0: "length", 1: "error", 2: "length", 3: "error"}
    assert outcome.errors[RequestId(1)].startswith("model_failed")


def test_adapters_that_fit_one_at_a_time_take_turns() -> None:
    """Room for the base, one adapter and one request: nobody waits for ever."""
    b = base()
    adapters = [adapter(name, b, granules=3) for name in ("x", "y", "z")]
    events = [ask(i, "b", "xyz"[i % 3], at_ns=i, tokens=12) for i in range(9)]
    outcome = run_scenario(scenario([b, *adapters], events, granules=9))
    assert set(outcome.finish.values()) == {"length"}
    dropped = [x.model for t, x in outcome.trace if isinstance(x, Drop) and t < outcome.ended_ns]
    assert {"x", "y"} <= set(dropped)
    assert "b" not in dropped


def test_the_adapter_used_longest_ago_goes_first() -> None:
    b = base(granules=4)
    adapters = [adapter(name, b, granules=2) for name in ("x", "y", "z")]
    order = ("y", "x", "z")
    events = [ask(i, "b", name, at_ns=i * 1000 * MS) for i, name in enumerate(order)]
    outcome = run_scenario(scenario([b, *adapters], events, granules=9))
    dropped = [x.model for t, x in outcome.trace if isinstance(x, Drop) and t < outcome.ended_ns]
    assert dropped == ["y"]


def test_a_request_too_large_beside_its_adapter_is_refused_with_the_sizes() -> None:
    b = base(granules=6)
    events = [ask(0, "b", tokens=180), ask(1, "b", "x", tokens=180), ask(2, "b", "x")]
    outcome = run_scenario(scenario([b, adapter("x", b, granules=4)], events, granules=11))
    assert outcome.finish == {0: "length", 1: "error", 2: "length"}
    assert outcome.errors[RequestId(1)].startswith("context_length_exceeded")


def test_an_adapter_larger_than_the_room_beside_its_base_fails_alone() -> None:
    b = base(granules=6)
    events = [ask(0, "b"), ask(1, "b", "x")]
    outcome = run_scenario(scenario([b, adapter("x", b, granules=7)], events))
    assert outcome.finish == {0: "length", 1: "error"}
    assert outcome.errors[RequestId(1)].startswith("model_failed: x needs")


@pytest.mark.parametrize("pinned", [False, True])
def test_models_switch_under_their_adapters(pinned: bool) -> None:
    """Two bases that do not fit together, each with an adapter and without, in the middle of
    answers; one adapter is pinned."""
    a, b = base("a", granules=7), base("b", granules=7)
    adapters = [adapter("x", a, pinned=pinned), adapter("y", b)]
    events = [ask(0, "a", "x", tokens=60), ask(1, "b", "y", tokens=60)]
    events += [ask(2, "a", tokens=60), ask(3, "b", tokens=60)]
    outcome = run_scenario(scenario([a, b, *adapters], events, turn_s=0.02))
    loads = [x.model for _, x in outcome.trace if isinstance(x, Load)]
    assert loads.count(a.name) > 1 and loads.count(b.name) > 1
    dropped = {x.model for t, x in outcome.trace if isinstance(x, Drop) and t < outcome.ended_ns}
    assert not (pinned and "x" in dropped)
    assert set(outcome.finish.values()) == {"length"}


def test_an_adapter_comes_and_goes_while_its_base_serves() -> None:
    b = base()
    x = adapter("x", b)
    events: list[tuple[int, object]] = [
        ask(0, "b", tokens=200),
        ask(1, "b", "x", at_ns=1),
        (100 * MS, Assign(model=x)),
        ask(2, "b", "x", at_ns=110 * MS, tokens=40),
        (150 * MS, Unassign(model=x.name)),
        ask(3, "b", "x", at_ns=160 * MS),
        (700 * MS, Assign(model=x)),
        ask(4, "b", "x", at_ns=710 * MS),
    ]
    one = scenario([b], events)
    one.models = [b, x]
    body = Body(one)
    body.run(one.arrivals)
    assert body.outcome.finish == {0: "length", 1: "error", 2: "length", 3: "error", 4: "length"}
    assert body.outcome.errors[RequestId(1)].startswith("model_not_found")
    assert body.outcome.errors[RequestId(3)].startswith("model_not_found")
    loads = [action.model for _, action in body.outcome.trace if isinstance(action, Load)]
    assert loads == ["b", "x", "x"]


def test_an_adapter_is_refused_on_another_base() -> None:
    a, b = base("a"), base("b")
    outcome = run_scenario(scenario([a, b, adapter("x", a)], [ask(0, "b", "x"), ask(1, "b")]))
    assert outcome.errors[RequestId(0)].startswith("model_not_found")
    assert outcome.finish[RequestId(1)] == "length"


def test_the_status_counts_a_request_at_its_adapter() -> None:
    b = base()
    one = scenario([b, adapter("x", b)], [ask(0, "b", tokens=200), ask(1, "b", "x", tokens=200)])
    body = Body(one)
    body.run(one.arrivals, until_ns=100 * MS)
    status = {model.name: model for model in body.scheduler.status().models}
    assert (status[b.name].running, status[ModelName("x")].running) == (1, 1)
    assert status[ModelName("x")].output_tokens > 0


def test_random_scenarios_have_steps_of_several_adapters() -> None:
    """So that the random tests test what they should."""
    mixed = 0
    for seed in range(60):
        outcome = run_scenario(random_scenario(seed))
        runs = [x for _, x in outcome.trace if isinstance(x, Run)]
        mixed += any(len({row.adapter for row in run.plan.rows}) > 1 for run in runs)
    assert mixed > 3


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1 << 40))
def test_crowded_adapters_end_right_and_leave_nothing(seed: int) -> None:
    """What does not fit waits, what runs has its adapter, and nobody waits for ever."""
    run_scenario(adapter_scenario(seed))


def test_no_adapter_takes_the_room_that_a_running_request_waits_for() -> None:
    """Two adapters took turns in the one free granule, loaded and dropped without end."""
    run_scenario(adapter_scenario(3983))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 4000, 500))
def test_many_crowded_adapters(first: int) -> None:
    for seed in range(first, first + 500):
        run_scenario(adapter_scenario(seed))


def test_a_leaving_adapter_that_is_still_held_is_not_loaded_by_a_wish() -> None:
    """Somebody pins it while it leaves and a request with it is on its way to the device."""
    unit = UnitSpec(granule_bytes=64 * KIB, num_granules=8, host_bytes=0)
    book = Book(unit)
    mover = Mover(book, preset("weft"), PrefixCache(book))
    of, own = base(), adapter("x", base())
    for spec in (of, own):
        book.ledger.add_model(spec)
        book.models[spec.name] = ModelEntry(spec)
    entry = book.models[own.name]
    request = Request(id=RequestId(1), model=of.name, adapter=own.name, prompt=(1,), max_tokens=1)
    rider = entry.riders[request.id] = RequestState(request, [], ())
    rider.phase, entry.leaving = "resuming", "all"
    assert not mover.loadable(entry)
    rider.phase = "parked"
    assert mover.loadable(entry)

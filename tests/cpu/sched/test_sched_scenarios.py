"""The scheduler against the modelled executor: everything that can go wrong, does."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.actions import CopyKv, Drop, Load, Run
from weft.core.events import Assign, Cancel, Pin, ReportStatus, Submit, Unassign
from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import Request, Sampling
from weft.core.unit import UnitSpec
from weft.sim.modelled import expected_stream
from weft.sim.scenario import (
    Body,
    Scenario,
    check_outcome,
    random_scenario,
    run_scenario,
    small_scenario,
)

KIB = 1024
MS = 1_000_000


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 1 << 40))
def test_random_scenarios_end_right_and_leave_nothing(seed: int) -> None:
    run_scenario(random_scenario(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 40), st.sampled_from([0.1, 0.3]))
def test_failures_at_every_action_are_survived(seed: int, fail: float) -> None:
    run_scenario(random_scenario(seed, fail=fail, requests=8))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1 << 40))
def test_hundreds_of_small_scenarios(seed: int) -> None:
    for i in range(50):
        run_scenario(small_scenario(seed + i))


def _streams(scenario: Scenario) -> dict[RequestId, list[int]]:
    outcome = run_scenario(scenario)
    return {
        request: tokens
        for request, tokens in outcome.streams.items()
        if outcome.finish[request] in ("stop", "length")
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 40))
def test_repeat_and_overlap_do_not_change_a_token(seed: int) -> None:
    """repeat = k equals k single steps, depth 2 equals depth 1."""
    scenario = random_scenario(seed, fail=0.0)
    scenario.arrivals = [(t, e) for t, e in scenario.arrivals if not isinstance(e, Cancel)]
    plain = msgspec.structs.replace(scenario.unit, max_repeat=1, depth=1)
    fast = msgspec.structs.replace(scenario.unit, max_repeat=16, depth=2)
    scenario.unit = plain
    one = _streams(scenario)
    scenario.unit = fast
    many = _streams(scenario)
    for request in one.keys() & many.keys():
        assert one[request] == many[request]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 40), st.lists(st.integers(1, 400), min_size=1, max_size=4))
def test_a_new_incarnation_goes_on_from_the_journal(seed: int, kills_ms: list[int]) -> None:
    """Kill the unit at any moment; the next one gets prompt, emitted tokens and parked KV."""
    scenario = random_scenario(seed)
    body = Body(scenario)
    arrivals = list(scenario.arrivals)
    begun_ns = 0
    for kill_ms in kills_ms:
        until = begun_ns + kill_ms * MS
        body.run(arrivals, until_ns=until)
        old, fed = body, [(t, e) for t, e in arrivals if t <= until]
        body = Body(scenario, outcome=old.outcome)
        body.now_ns = until
        body.executor.advance_to(until)
        body.executor._host = old.executor._host
        body.executor._expected = old.executor._expected
        again = _resubmissions(scenario, fed, old, until, begun_ns)
        body.parked = {e.request.id: e.resume for _, e in again if _resumes(e)}
        arrivals = again + [(t, e) for t, e in arrivals if t > until]
        begun_ns = until
    body.run(arrivals)
    check_outcome(scenario, body.outcome)
    assert not body.parked


def _resumes(event: object) -> bool:
    return isinstance(event, Submit) and event.resume is not None


def _resubmissions(
    scenario: Scenario,
    fed: list[tuple[int, object]],
    old: Body,
    now_ns: int,
    begun_ns: int,
) -> list[tuple[int, object]]:
    """What the hub sends to a new incarnation: models, then unfinished requests."""
    events: list[tuple[int, object]] = [(now_ns, Assign(model=spec)) for spec in scenario.models]
    for _, event in fed:
        if isinstance(event, Submit) and event.request.id not in old.outcome.finish:
            request = event.request
            emitted = tuple(old.outcome.streams.get(request.id, []))
            resume = old.parked.get(request.id)
            events.append((now_ns, Submit(request=request, emitted=emitted, resume=resume)))
    return events


# -- scripted ----------------------------------------------------------------------------------


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


def request(i: int, name: str, *, at_ns: int = 0, tokens: int = 8, **changes: object) -> Submit:
    values: dict[str, object] = {
        "id": RequestId(i),
        "model": ModelName(name),
        "prompt": tuple(range(1, 7)),
        "max_tokens": tokens,
        "arrival_ns": at_ns,
    }
    return Submit(request=Request(**{**values, **changes}))  # type: ignore[arg-type]


def unit(**changes: object) -> UnitSpec:
    values: dict[str, object] = {
        "granule_bytes": 64 * KIB,
        "num_granules": 12,
        "host_bytes": 8 << 20,
        "num_slots": 16,
        "max_rows": 8,
        "max_step_tokens": 32,
    }
    return UnitSpec(**{**values, **changes})  # type: ignore[arg-type]


def scenario(models: list[ModelSpec], events: list[tuple[int, object]], **kw: object) -> Scenario:
    assigns = [(0, Assign(model=m)) for m in models]
    the_unit = kw.pop("unit", unit())
    return Scenario(unit=the_unit, models=models, arrivals=[*assigns, *events], **kw)  # type: ignore[arg-type]


def test_two_models_that_do_not_fit_together_take_turns_in_the_middle_of_answers() -> None:
    """Both are busy for long; turns of 20 ms; each is parked and resumed, nothing changes."""
    a, b = model("a", granules=8), model("b", granules=8)
    events = [(0, request(0, "a", tokens=60)), (0, request(1, "b", tokens=60))]
    outcome = run_scenario(scenario([a, b], events, turn_s=0.02))
    loads = [action.model for _, action in outcome.trace if isinstance(action, Load)]
    assert loads[:4] == ["a", "b", "a", "b"]
    parks = [x for _, x in outcome.trace if isinstance(x, CopyKv) and x.to == "host"]
    assert len(parks) >= 3
    assert outcome.finish == {0: "length", 1: "length"}


def test_without_host_memory_kv_is_computed_again_with_the_same_tokens() -> None:
    a, b = model("a", granules=8), model("b", granules=8)
    events = [(0, request(0, "a", tokens=60)), (0, request(1, "b", tokens=60))]
    outcome = run_scenario(scenario([a, b], events, turn_s=0.02, unit=unit(host_bytes=0)))
    assert not any(isinstance(x, CopyKv) for _, x in outcome.trace)
    assert outcome.finish == {0: "length", 1: "length"}


def test_models_that_fit_stay_and_nothing_is_copied_twice() -> None:
    models = [model(n, granules=2) for n in "abc"]
    events = [(i * MS, request(i, "abc"[i % 3], tokens=20)) for i in range(9)]
    outcome = run_scenario(scenario(models, events, turn_s=0.02))
    drops_before_end = [x for t, x in outcome.trace if isinstance(x, Drop) and t < outcome.ended_ns]
    assert outcome.switches == 3
    assert not drops_before_end


def test_a_pinned_model_is_never_dropped() -> None:
    a, b, c = model("a", granules=4, pinned=True), model("b", granules=6), model("c", granules=6)
    events = [(i * 30 * MS, request(i, "abc"[i % 3], tokens=20)) for i in range(12)]
    outcome = run_scenario(scenario([a, b, c], events, turn_s=0.01))
    dropped = {x.model for t, x in outcome.trace if isinstance(x, Drop) and t < outcome.ended_ns}
    assert dropped == {"b", "c"}


def test_the_first_step_follows_the_load_layer_by_layer() -> None:
    outcome = run_scenario(scenario([model("a")], [(0, request(0, "a"))]))
    load = next(x for _, x in outcome.trace if isinstance(x, Load))
    first = next(x for _, x in outcome.trace if isinstance(x, Run))
    assert first.follow == load.id
    assert load.id not in first.after


def test_two_steps_are_in_flight_and_the_second_takes_its_input_on_the_device() -> None:
    the_unit = unit(max_repeat=1)
    outcome = run_scenario(scenario([model("a")], [(0, request(0, "a"))], unit=the_unit))
    runs = [(t, x) for t, x in outcome.trace if isinstance(x, Run)]
    assert runs[0][0] == runs[1][0], "two steps are planned at once"
    assert runs[0][1].id in runs[1][1].after
    assert runs[1][1].plan.rows[0].input is None


def test_a_lone_decode_batch_is_repeated_and_a_newcomer_interrupts_it() -> None:
    events = [(0, request(0, "a", tokens=200)), (300 * MS, request(1, "a", tokens=8))]
    outcome = run_scenario(scenario([model("a", granules=2)], events))
    runs = [x for _, x in outcome.trace if isinstance(x, Run)]
    assert max(x.plan.repeat for x in runs) == 16
    waited = outcome.first_token_ns[RequestId(1)] - 300 * MS
    assert waited < 4 * 5 * MS, "the newcomer waited for the whole repeat"


def test_a_request_that_is_too_long_for_the_device_is_refused_with_the_sizes() -> None:
    events = [(0, request(0, "a", tokens=240)), (0, request(1, "a", tokens=10))]
    outcome = run_scenario(scenario([model("a", granules=10)], events))
    assert outcome.finish == {0: "error", 1: "length"}
    assert "context_length_exceeded" in outcome.errors[RequestId(0)]


def test_a_model_larger_than_the_device_fails_alone() -> None:
    events = [(0, request(0, "big")), (0, request(1, "a"))]
    outcome = run_scenario(scenario([model("big", granules=13), model("a")], events))
    assert outcome.finish == {0: "error", 1: "length"}
    assert outcome.errors[RequestId(0)].startswith("model_failed: big needs")


def test_hold_deadline() -> None:
    hold = request(1, "b", hold_deadline_ns=5 * MS, tokens=5)
    events = [(0, request(0, "a", tokens=30)), (1, hold)]
    models = [model("a", granules=8), model("b", granules=8)]
    outcome = run_scenario(scenario(models, events, turn_s=1.0))
    assert outcome.errors[RequestId(1)].startswith("hold_deadline")
    assert outcome.finish[RequestId(0)] == "length"


def test_cancel_acts_within_the_steps_in_flight() -> None:
    events = [(0, request(0, "a", tokens=200)), (100 * MS, Cancel(request=RequestId(0)))]
    outcome = run_scenario(scenario([model("a", granules=2)], events))
    assert outcome.finish == {0: "cancelled"}
    assert 100 * MS <= outcome.ended_ns < 101 * MS


def test_pin_arrives_while_serving() -> None:
    a, b = model("a", granules=6), model("b", granules=8)
    events = [
        (0, request(0, "a", tokens=10)),
        (1, Pin(model=ModelName("a"), pinned=True)),
        (400 * MS, request(1, "a", tokens=4)),
    ]
    outcome = run_scenario(scenario([a, b], events))
    assert outcome.finish == {0: "length", 1: "length"}
    assert outcome.switches == 1


def test_an_unassigned_model_finishes_what_it_has_and_holds_nobody_up() -> None:
    """It is away, one of its requests parked, when it is unassigned: it comes back for that one."""
    a, b = model("a", granules=8), model("b", granules=8)
    events = [
        (0, request(0, "a", tokens=40)),
        (0, request(1, "b", tokens=40)),
        (130 * MS, Unassign(model=ModelName("a"))),
        (140 * MS, request(2, "a")),
    ]
    outcome = run_scenario(scenario([a, b], events, turn_s=0.1))
    assert outcome.finish == {0: "length", 1: "length", 2: "error"}
    assert outcome.errors[RequestId(2)].startswith("model_not_found")


def test_a_model_whose_loads_failed_is_tried_again_when_the_client_was_told_to_come_back() -> None:
    events = [(0, request(0, "a")), (1_000 * MS, request(1, "a")), (40_000 * MS, request(2, "a"))]
    body = Body(scenario([model("a")], events))
    start = body.executor._start
    broken = True

    def fail_loads(queue: str, action: object) -> None:
        start(queue, action)  # type: ignore[arg-type]
        active = body.executor._busy[queue]
        if isinstance(action, Load) and active is not None and active.action is action and broken:
            active.fail_at = 0

    body.executor._start = fail_loads  # type: ignore[method-assign]
    body.run(body.scenario.arrivals, until_ns=2_000 * MS)
    assert body.outcome.finish == {0: "error", 1: "error"}
    broken = False
    body.run(events[2:])
    assert body.outcome.finish == {0: "error", 1: "error", 2: "length"}


def test_prefills_run_by_priority() -> None:
    """Both are admitted at once; the urgent one's prompt is computed first."""
    late = request(1, "a", prompt=tuple(range(1, 41)), priority=-1, at_ns=1)
    events = [(0, request(0, "a", prompt=tuple(range(1, 41)))), (0, late)]
    outcome = run_scenario(scenario([model("a", granules=2)], events))
    first = next(x for _, x in outcome.trace if isinstance(x, Run))
    assert [row.request for row in first.plan.rows] == [1]


def test_dedicated_refuses_what_does_not_fit_beside_the_others() -> None:
    models = [model("a", granules=6), model("b", granules=5), model("c", granules=4)]
    events = [(MS, request(i, name)) for i, name in enumerate("abc")]
    body = Body(scenario(models, events, policy="dedicated"))
    body.run([*body.scenario.arrivals, (5_000 * MS, ReportStatus())])
    assert body.outcome.finish == {0: "length", 1: "length", 2: "error"}
    states = {m.name: m.state for m in body.scheduler.status().models}
    assert states == {"a": "resident", "b": "resident", "c": "failed"}


def test_a_step_that_always_fails_fails_its_requests_and_no_others() -> None:
    """Every run with request 1 in it fails; the others finish, request 1 fails alone."""
    events = [(0, request(i, "a", tokens=12)) for i in range(3)]
    body = Body(scenario([model("a", granules=2)], events))
    start = body.executor._start

    def fail_on_1(queue: str, action: object) -> None:
        start(queue, action)  # type: ignore[arg-type]
        active = body.executor._busy[queue]
        if isinstance(action, Run) and active is not None and active.action is action:
            bad = any(row.request == 1 for row in action.plan.rows)
            active.fail_at = 0 if bad else -1

    body.executor._start = fail_on_1  # type: ignore[method-assign]
    body.run(body.scenario.arrivals)
    assert body.outcome.finish == {0: "length", 1: "error", 2: "length"}
    assert body.outcome.errors[RequestId(1)].startswith("request_failed")


def test_seeded_streams_depend_on_seed_and_position_only() -> None:
    sampling = Sampling(temperature=1.0, seed=7)
    events = [(0, request(i, "a", tokens=12, sampling=sampling)) for i in range(2)]
    events.append((0, request(2, "a", tokens=12, sampling=Sampling(temperature=1.0, seed=8))))
    outcome = run_scenario(scenario([model("a", granules=2)], events))
    assert outcome.streams[RequestId(0)] == outcome.streams[RequestId(1)]
    assert outcome.streams[RequestId(0)] != outcome.streams[RequestId(2)]


def test_the_modelled_model_depends_on_every_token_of_its_context() -> None:
    """The canary of the simulator: its streams are worth comparing."""
    prompt = list(range(10))
    kw = {"max_tokens": 20, "min_tokens": 0, "stop_ids": frozenset[int](), "vocab_size": 1000}
    plain = expected_stream(prompt, Sampling(), **kw)  # type: ignore[arg-type]
    for i in range(10):
        changed = [*prompt[:i], prompt[i] + 1, *prompt[i + 1 :]]
        assert expected_stream(changed, Sampling(), **kw) != plain  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_campaign_of_scenarios(block: int, campaign_seed: int) -> None:
    for i in range(1000):
        run_scenario(random_scenario(campaign_seed * 1_000_003 + block * 1000 + i))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_campaign_of_small_scenarios(block: int, campaign_seed: int, campaign_full: bool) -> None:
    for i in range(25_000 if campaign_full else 5_000):
        run_scenario(small_scenario(campaign_seed * 1_000_003 + block * 100_000 + i), check=False)


def test_holes_in_a_models_own_range_keep_nobody_waiting() -> None:
    """A model that stays came while the end of the KV range was in use, so it took the middle.
    What is left would do for the next request, in one piece."""
    granule = 64 * KIB

    def spec(name: str, granules: int, *, pinned: bool = False) -> ModelSpec:
        return ModelSpec(
            name=ModelName(name),
            weight_bytes=granules * granule,
            num_layers=2,
            page_tokens=4,
            page_bytes=80 * KIB,
            max_context_tokens=64,
            vocab_size=50,
            pinned=pinned,
        )

    def submit(number: int, prompt: int, output: int) -> Submit:
        ids = tuple((i + number) % 50 for i in range(prompt))
        return Submit(
            request=Request(
                id=RequestId(number), model=ModelName("a"), prompt=ids, max_tokens=output
            )
        )

    unit = UnitSpec(granule_bytes=granule, num_granules=9, host_bytes=1 << 20)
    scenario = Scenario(
        unit=unit,
        models=[spec("a", 1), spec("b", 3, pinned=True)],
        arrivals=[],
    )
    body = Body(scenario)
    body.run([(0, Assign(model=scenario.models[0])), (0, submit(1, 11, 1))], until_ns=0)
    body.run([(0, submit(2, 5, 3))], until_ns=0)
    while RequestId(1) not in body.outcome.finish:
        body.run([], until_ns=body.now_ns + MS)
        body.now_ns += MS
    assert RequestId(2) not in body.outcome.finish
    now_ns = body.now_ns
    body.run([(now_ns, Assign(model=scenario.models[1])), (now_ns + 1000 * MS, submit(3, 11, 1))])
    assert body.outcome.finish[RequestId(3)] == "length"
    assert [m.model for m in body.outcome.moved if m.state == "resident"] == ["a", "b"]

"""The prefix cache in the scheduler: who finds what, and who never does."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.actions import CopyKv, Load, Run, UnitAction
from weft.core.events import Assign, Cancel, Pin, Submit, Unassign, UnitEvent
from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import Request
from weft.core.unit import UnitSpec
from weft.sched.prefix import NO_REQUEST
from weft.sim.scenario import Body, Outcome, Scenario, check_outcome, random_scenario, run_scenario

KIB = 1024
MS = 1_000_000
UNIT = UnitSpec(granule_bytes=64 * KIB, num_granules=12, host_bytes=8 << 20)
PROMPT = tuple(range(1, 19))
"""18 tokens: four whole pages of four, and two more."""


def model(name: str = "a", *, granules: int = 2, **changes: object) -> ModelSpec:
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


def ask(i: int, *, at_ms: int = 0, name: str = "a", **changes: object) -> tuple[int, UnitEvent]:
    values: dict[str, object] = {
        "id": RequestId(i),
        "model": ModelName(name),
        "prompt": PROMPT,
        "max_tokens": 8,
        "arrival_ns": at_ms * MS,
    }
    request = Request(**{**values, **changes})  # type: ignore[arg-type]
    return at_ms * MS, Submit(request=request)


def live(
    events: list[tuple[int, UnitEvent]], *models: ModelSpec, turn_s: float = 0.02, **unit: object
) -> Outcome:
    values: dict[str, object] = {
        "granule_bytes": 64 * KIB,
        "num_granules": 12,
        "host_bytes": 8 << 20,
        "num_slots": 16,
        "max_rows": 8,
        "max_step_tokens": 32,
    }
    chosen = list(models or (model(),))
    arrivals = [(0, Assign(model=m)) for m in chosen]
    return run_scenario(
        Scenario(
            unit=UnitSpec(**{**values, **unit}),  # type: ignore[arg-type]
            models=chosen,
            arrivals=[*arrivals, *events],
            turn_s=turn_s,
        )
    )


def starts(outcome: Outcome, request: int) -> list[int]:
    """Where the rows of a request begin, step by step."""
    return [
        row.start
        for _, run in outcome.trace
        if isinstance(run, Run)
        for row in run.plan.rows
        if row.request == request
    ]


def test_the_second_request_with_a_prompt_computes_what_is_behind_its_whole_pages() -> None:
    outcome = live([ask(0), ask(1, at_ms=500)])
    assert outcome.cached_tokens == {0: 0, 1: 16}
    assert starts(outcome, 0)[0] == 0 and starts(outcome, 1)[0] == 16
    assert outcome.streams[RequestId(0)] == outcome.streams[RequestId(1)]


def test_at_least_one_token_is_always_computed() -> None:
    outcome = live([ask(0, prompt=PROMPT[:16]), ask(1, at_ms=500, prompt=PROMPT[:16])])
    assert outcome.cached_tokens[RequestId(1)] == 12
    assert starts(outcome, 1)[0] == 12


def test_an_answer_is_found_by_the_next_turn_of_its_conversation() -> None:
    """Prompt and answer of the first request are the beginning of the second one's prompt."""
    first = live([ask(0, max_tokens=12)]).streams[RequestId(0)]
    longer = (*PROMPT, *first, 7, 8, 9)
    outcome = live([ask(0, max_tokens=12), ask(1, at_ms=500, prompt=longer)])
    # The last token drawn was never computed: 18 + 12 - 1 positions are seven whole pages.
    assert outcome.cached_tokens[RequestId(1)] == 28


def test_a_prompt_is_shared_while_it_is_in_use_and_the_first_partial_page_is_not() -> None:
    outcome = live([ask(0, max_tokens=60), ask(1, at_ms=150), ask(2, at_ms=150)])
    assert outcome.cached_tokens == {0: 0, 1: 16, 2: 16}
    tables = {
        row.request: row.append_pages
        for _, run in reversed(outcome.trace)
        if isinstance(run, Run)
        for row in run.plan.rows
        if row.first_page == 0 and row.append_pages
    }
    assert tables[RequestId(0)][:4] == tables[RequestId(1)][:4] == tables[RequestId(2)][:4]
    rest = [page for pages in tables.values() for page in pages[4:]]
    assert len(rest) == len(set(rest))


def test_another_tenant_or_adapter_never_finds_it() -> None:
    events = [
        ask(0, tenant="x"),
        ask(1, at_ms=500, tenant="y"),
        ask(2, at_ms=1000),
        ask(3, at_ms=1500, tenant="x"),
    ]
    assert live(events).cached_tokens == {0: 0, 1: 0, 2: 0, 3: 16}


@pytest.mark.parametrize(
    "changes", [{"prompt_logprobs": 1}, {"embed": "last", "max_tokens": 0}], ids=["scores", "embed"]
)
def test_who_needs_every_position_computes_every_position(changes: dict[str, object]) -> None:
    outcome = live([ask(0), ask(1, at_ms=500, **changes), ask(2, at_ms=1000)])
    assert starts(outcome, 1)[0] == 0
    assert outcome.cached_tokens == {0: 0, 1: 0, 2: 16}


def test_it_can_be_switched_off() -> None:
    outcome = live([ask(0), ask(1, at_ms=500)], prefix_cache=False)
    assert outcome.cached_tokens == {0: 0, 1: 0}
    assert starts(outcome, 1)[0] == 0


def test_a_model_that_was_unassigned_and_comes_back_begins_anew() -> None:
    events: list[tuple[int, UnitEvent]] = [
        ask(0),
        (500 * MS, Unassign(model=ModelName("a"))),
        (1000 * MS, Assign(model=model())),
        ask(1, at_ms=1500),
        (2000 * MS, Unassign(model=ModelName("a"))),
        (2000 * MS, Assign(model=model())),
        ask(2, at_ms=2500),
    ]
    assert live(events).cached_tokens == {0: 0, 1: 0, 2: 0}


def test_long_prompts_are_found_whole() -> None:
    """A step fills more pages than are caught up with at once."""
    big = model(page_tokens=2, page_bytes=64, max_context_tokens=4096)
    prompt = tuple(i % 50 for i in range(3000))
    events = [ask(0, prompt=prompt), ask(1, at_ms=3000, prompt=prompt)]
    outcome = live(events, big, max_step_tokens=2048, num_granules=40)
    assert outcome.cached_tokens[RequestId(1)] == 2998


def test_a_cancelled_request_leaves_what_it_had_computed() -> None:
    events = [ask(0, max_tokens=200), (150 * MS, Cancel(request=RequestId(0)))]
    outcome = live([*events, ask(1, at_ms=500)])
    assert outcome.finish[RequestId(0)] == "cancelled"
    assert outcome.cached_tokens[RequestId(1)] == 16


def test_cached_pages_make_way_for_requests_before_anybody_is_shed() -> None:
    """Ten different prompts pass through a KV range with room for two requests."""
    events = [
        ask(i, at_ms=400 * i, prompt=tuple((7 * i + j) % 50 for j in range(100)), max_tokens=20)
        for i in range(10)
    ]
    outcome = live(events, num_granules=6)
    assert set(outcome.finish.values()) == {"length"}
    assert not [x for _, x in outcome.trace if isinstance(x, CopyKv) and x.request >= 0]
    for i in range(10):
        assert starts(outcome, i).count(0) == 1, "it was computed twice"


def test_cached_pages_make_way_for_weights() -> None:
    """Model b needs granules that hold nothing but cached pages of a, which stays."""
    events = [
        ask(i, at_ms=400 * i, prompt=tuple((7 * i + j) % 50 for j in range(100))) for i in range(10)
    ]
    outcome = live([*events, ask(10, at_ms=5000, name="b")], model(), model("b", granules=4))
    assert outcome.finish[RequestId(10)] == "length"
    drops = [t for t, x in outcome.trace if type(x).__name__ == "Drop" and t < outcome.ended_ns]
    assert not drops, "a was sent away though its cache was room enough"


SWITCHED = model("a", granules=8), model("b", granules=8)
"""They do not fit together."""


def copies(outcome: Outcome, to: str) -> list[CopyKv]:
    """Those of the prefix cache."""
    return [
        x
        for _, x in outcome.trace
        if isinstance(x, CopyKv) and x.to == to and x.request == NO_REQUEST
    ]


def test_a_prefix_outlives_the_switch_of_its_model() -> None:
    events = [ask(0), ask(1, at_ms=500, name="b"), ask(2, at_ms=1000), ask(3, at_ms=1500)]
    outcome = live(events, *SWITCHED)
    assert outcome.cached_tokens == {0: 0, 1: 0, 2: 16, 3: 16}
    assert starts(outcome, 2)[0] == 16
    (fetch,) = copies(outcome, "device")
    assert len(fetch.pages) == 4
    assert outcome.streams[RequestId(0)] == outcome.streams[RequestId(2)]


@pytest.mark.parametrize("changes", [{"host_bytes": 0}, {"host_bytes": 16 * KIB}])
def test_without_room_in_the_host_store_it_does_not(changes: dict[str, int]) -> None:
    """A quarter of four pages is one page: the last of the chain, and later its beginning."""
    events = [ask(0), ask(1, at_ms=500, name="b"), ask(2, at_ms=1000)]
    outcome = live(events, *SWITCHED, **changes)
    assert outcome.cached_tokens[RequestId(2)] <= 4
    assert set(outcome.finish.values()) == {"length"}


def test_a_model_that_has_the_device_for_itself_copies_nothing() -> None:
    assert not copies(live([ask(0), ask(1, at_ms=500)]), "host")


def test_what_was_copied_once_is_not_copied_again() -> None:
    events = [ask(i, at_ms=500 * i, name="ab"[i % 2]) for i in range(8)]
    outcome = live(events, *SWITCHED)
    pages = [(x.model, page) for x in copies(outcome, "host") for page in x.pages]
    # Six pages of each model, prompt and answer; the last one of the answers is not whole.
    assert len(pages) == 12
    assert len(copies(outcome, "device")) == 6


@pytest.mark.parametrize("fails", [1, 99])
def test_a_copy_back_that_fails_is_tried_again_and_then_the_prefix_is_computed(fails: int) -> None:
    """And what a failed copy left behind on the device is found by nobody."""
    events = [ask(0), ask(1, at_ms=500, name="b"), ask(2, at_ms=1000), ask(3, at_ms=1500)]
    arrivals = [*((0, Assign(model=m)) for m in SWITCHED), *events]
    body = Body(Scenario(unit=UNIT, models=list(SWITCHED), arrivals=arrivals))
    start, seen = body.executor._start, []

    def fail_some(queue: str, action: UnitAction) -> None:
        start(queue, action)
        active = body.executor._busy[queue]
        if isinstance(action, CopyKv) and action.to == "device" and active is not None:
            seen.append(action)
            if len(seen) <= fails:
                active.fail_at = 0

    body.executor._start = fail_some  # type: ignore[method-assign]
    body.run(arrivals)
    check_outcome(body.scenario, body.outcome)
    assert len(seen) == 2
    assert body.outcome.cached_tokens == {0: 0, 1: 0, 2: 16 if fails == 1 else 0, 3: 16}


def test_host_room_goes_to_parked_requests_first() -> None:
    """The region holds two parked requests; cached pages make way for the second."""
    events = [
        ask(0, max_tokens=14),
        ask(1, at_ms=300, max_tokens=100, prompt=(5, *PROMPT)),
        ask(2, at_ms=310, max_tokens=100, name="b", prompt=(6, *PROMPT)),
    ]
    outcome = live(events, *SWITCHED, host_bytes=248 * KIB)
    assert set(outcome.finish.values()) == {"length"}
    assert copies(outcome, "host")
    for i in (1, 2):
        assert starts(outcome, i).count(0) == 1, "it was computed twice for want of host room"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 40), st.sampled_from([0.0, 0.3]))
def test_crowds_that_share_beginnings_in_little_memory(seed: int, fail: float) -> None:
    """As `random_scenario`, but all requests are of one model and begin alike."""
    scenario = crowd(seed, fail)
    run_scenario(scenario)


def crowd(seed: int, fail: float) -> Scenario:
    scenario = random_scenario(seed, fail=fail, requests=12)
    arrivals: list[tuple[int, UnitEvent]] = []
    names = [m.name for m in scenario.models if m.base is None][:2]
    on_it = {name: [m.name for m in scenario.models if m.base == name] for name in names}
    for at, event in scenario.arrivals:
        if isinstance(event, Submit):
            request = event.request
            begin = tuple((seed + j) % 7 for j in range(16))[: 4 + request.id]
            name = names[request.id % len(names)]
            prompt = (*begin, *request.prompt)[:20]
            request = msgspec.structs.replace(request, model=name, prompt=prompt)
            if request.adapter not in on_it[name]:
                request = msgspec.structs.replace(request, adapter=None)
            event = Submit(request=request)
        arrivals.append((at, event))
    scenario.arrivals = arrivals
    return scenario


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 40))
def test_streams_are_the_same_with_and_without_it(seed: int) -> None:
    scenario = crowd(seed, 0.0)
    outcomes = []
    for on in (True, False):
        scenario.unit = msgspec.structs.replace(scenario.unit, prefix_cache=on)
        outcomes.append(run_scenario(scenario))
    for request in outcomes[0].streams:
        if all(o.finish[request] in ("stop", "length") for o in outcomes):
            assert outcomes[0].streams[request] == outcomes[1].streams[request]


def test_a_new_incarnation_starts_empty() -> None:
    first = Body(
        Scenario(unit=UNIT, models=[model()], arrivals=[(0, Assign(model=model())), ask(0)])
    )
    first.run(first.scenario.arrivals)
    second = Body(first.scenario, outcome=first.outcome)
    second.run([(0, Assign(model=model())), ask(1)])
    assert first.outcome.cached_tokens == {0: 0, 1: 0}
    assert set(first.outcome.finish) == {0, 1}


def test_a_model_that_is_pinned_comes_in_where_only_cached_pages_are() -> None:
    """The cache has taken all free granules of the device."""
    events = [
        ask(i, at_ms=400 * i, prompt=tuple((7 * i + j) % 50 for j in range(100))) for i in range(20)
    ]
    pin = (9000 * MS, Pin(model=ModelName("b"), pinned=True))
    outcome = live([*events, pin, ask(20, at_ms=10_000)], model(), model("b", granules=4))
    loads = [(t, x.model) for t, x in outcome.trace if isinstance(x, Load)]
    assert [name for _, name in loads] == ["a", "b"]
    assert 9000 * MS <= loads[1][0] < 9100 * MS


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_campaign_of_crowds(block: int, campaign_seed: int) -> None:
    for i in range(500):
        run_scenario(crowd(campaign_seed * 1_000_003 + block * 1000 + i, [0.0, 0.3][i % 2]))

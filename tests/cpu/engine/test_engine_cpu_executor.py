"""The CPU executor on tiny models: load, step, park, resume elsewhere, drop, load; failures."""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.engine_kit import (
    Engine,
    TinyModel,
    await_events,
    is_end,
    plain_run,
    resident,
    row,
    tiny_models,
    unit_for,
)
from support.plain import PlainModel
from weft.core.actions import Interrupt, Load, Run, UnitAction
from weft.core.events import CopyDone, Done, Failed, StepDone
from weft.core.ids import ActionId
from weft.core.request import Extent, Sampling
from weft.memory.base import ArenaError

PROMPT = [17, 80, 33, 5, 99, 64, 21, 40, 71, 12, 90]
PAGES = [9, 2, 7, 4, 11, 0, 5]
"""Enough for 28 tokens at 4 a page."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    folder = tmp_path_factory.mktemp("models")
    return tiny_models(folder, {"a": {}, "b": {"family": "qwen2", "tied": True}}, dtype="float64")


@pytest.fixture(scope="module")
def wanted(models: dict[str, TinyModel]) -> list[int]:
    """What model a answers to PROMPT, by a run that knows no executor."""
    tokens, _ = PlainModel(models["a"].path, "float64").generate(PROMPT, 16)
    return tokens


@pytest.fixture
def engine(models: dict[str, TinyModel]) -> Iterator[Engine]:
    with Engine(models, unit_for(models)) as made:
        yield made


def cause(engine: Engine, action: int) -> str:
    end = engine.ends[action]
    assert isinstance(end, Failed), end
    return end.cause


def test_plain_run_equals_the_model_alone(engine: Engine, wanted: list[int]) -> None:
    assert list(plain_run(engine, "a", PROMPT, 16)) == wanted
    assert list(plain_run(engine, "a", PROMPT, 16, chunk=3)) == wanted
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=40, seed=-7)
    alone, _ = PlainModel(engine.models["b"].path, "float64").generate(
        PROMPT, 12, sampling=sampling
    )
    assert list(plain_run(engine, "b", PROMPT, 12, sampling=sampling)) == alone
    engine.executor.check_integrity(mapped={})


def test_stop_ids_end_and_min_tokens_mask(engine: Engine, wanted: list[int]) -> None:
    stop = wanted[5]
    first = wanted.index(stop)
    assert list(plain_run(engine, "a", PROMPT, 16, stop_ids=[stop])) == wanted[: first + 1]
    masked = plain_run(engine, "a", PROMPT, 16, stop_ids=[stop], min_tokens=8)
    assert list(masked[:first]) == wanted[:first]
    assert stop not in masked[:8]


def start(engine: Engine, *, tokens: int = 1) -> list[int]:
    """Load model a, map, prefill PROMPT into PAGES of slot 0 and decode: `tokens` drawn."""
    engine.do(engine.load("a", range(engine.weight_granules("a"))))
    base = engine.weight_granules("a")
    engine.do(engine.map_kv("a", {i: base + i for i in range(8)}))
    run = engine.run("a", [row(0, PROMPT, pages=PAGES)])
    engine.do(run)
    return [engine.drawn[run.id][0][0], *decode(engine, 1, tokens - 1)]


def decode(engine: Engine, first: int, count: int, **fields: int) -> list[int]:
    """`count` decode steps one by one; `first` tokens were drawn before."""
    out: list[int] = []
    for i in range(first, first + count):
        run = engine.run("a", [row(len(PROMPT) + i - 1, None, output_index=i, **fields)])
        engine.do(run)
        out.append(engine.drawn[run.id][0][0])
    return out


def test_park_drop_load_and_resume_elsewhere(engine: Engine, wanted: list[int]) -> None:
    drawn = start(engine, tokens=6)
    spec = engine.models["a"].spec
    used = PAGES[:4]  # 11 + 5 positions are written
    size = len(used) * spec.page_bytes
    at = engine.unit.host_offset + 4096
    extents = [Extent(at + size, 1000), Extent(at, 5000), Extent(at + 65536, size - 6000)]
    base = engine.weight_granules("a")
    weights = list(range(base))
    park = engine.copy_kv("a", "host", used, extents)
    unmap = engine.unmap_kv("a", {i: base + i for i in range(8)}, after=(park.id,))
    drop = engine.drop("a", weights)
    # The same granules and others, elsewhere; overlapping, ordered by `after` alone.
    load = engine.load(
        "a", [*range(base + 7, base - 1, -1), *weights[8:]], after=(drop.id, unmap.id)
    )
    remap = engine.map_kv("a", {3: 1, 4: 0, 0: 5, 1: 3, 2: 7, 5: 6}, after=(drop.id, unmap.id))
    moved = [1, 8, 3, 6, 0, 2]
    resume = engine.copy_kv("a", "device", moved[:4], extents, after=(remap.id, park.id))
    step = engine.run(
        "a",
        [row(len(PROMPT) + 5, [drawn[5]], slot=3, pages=moved, output_index=6)],
        after=(resume.id,),
        follow=load.id,
    )
    actions = [park, unmap, drop, load, remap, resume, step]
    for action in actions:
        engine.submit(action)
    ends = engine.wait(*(a.id for a in actions))
    assert [type(e) for e in ends] == [CopyDone, Done, Done, CopyDone, Done, CopyDone, StepDone]
    assert isinstance(ends[0], CopyDone) and ends[0].num_bytes == size
    assert isinstance(ends[3], CopyDone) and ends[3].num_bytes == spec.weight_bytes
    drawn.append(engine.drawn[step.id][0][0])
    drawn += decode(engine, 7, 6, slot=3)
    assert drawn == wanted[: len(drawn)]
    assert engine.executor.checksums.compared >= 4 + 2 * 4  # pages, and extents of two loads
    order = list(engine.ends)
    assert order.index(park.id) < order.index(unmap.id) < order.index(load.id)
    assert order.index(drop.id) < order.index(remap.id) < order.index(resume.id)


@pytest.mark.parametrize("repeat", [2, 5, 8])
def test_repeat_equals_single_steps(engine: Engine, wanted: list[int], repeat: int) -> None:
    drawn = start(engine)
    run = engine.run("a", [row(len(PROMPT), None, output_index=1)], repeat=repeat)
    end = engine.do(run)
    assert isinstance(end, StepDone) and len(end.token_ns) == end.iterations
    drawn += [tokens[0] for tokens in engine.drawn[run.id]]
    assert drawn == wanted[: 1 + repeat]
    drawn += decode(engine, 1 + repeat, 3)
    assert drawn == wanted[: 4 + repeat], "the last token stayed on the device"


def test_a_long_repeat_reports_on_the_way(
    engine: Engine, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.engine.cpu_executor.REPORT_NS", -1)
    start(engine)
    run = engine.run("a", [row(len(PROMPT), None, output_index=1)], repeat=4)
    engine.submit(run)
    events = await_events(engine.executor, lambda seen: any(is_end(e) for e in seen))
    reports = [e for e in events if isinstance(e, StepDone)]
    assert [(e.iterations, e.last) for e in reports] == [(1, False)] * 3 + [(1, True)]
    assert [t for e in reports for (t,) in e.tokens] == wanted[1:5]


def test_lanes_run_beside_each_other(models: dict[str, TinyModel], wanted: list[int]) -> None:
    """The step of lane 1 ends while that of lane 0 is held."""
    opened = threading.Event()

    def fault(action: UnitAction) -> None:
        if isinstance(action, Run) and action.lane == 0 and action.plan.model == "b":
            assert opened.wait(60)

    with Engine(models, unit_for(models, lanes=2), fault=fault) as engine:
        a, b = engine.weight_granules("a"), engine.weight_granules("b")
        engine.do(engine.load("a", range(a)))
        engine.do(engine.load("b", range(a, a + b)))
        engine.do(engine.map_kv("a", {i: a + b + i for i in range(8)}))
        engine.do(engine.map_kv("b", {0: a + b + 8}))
        held = engine.run("b", [row(0, [1, 2], request=2, slot=1, pages=[0])])
        engine.submit(held)
        free = engine.run("a", [row(0, PROMPT, pages=PAGES)], lane=1)
        engine.do(free)
        assert engine.drawn[free.id] == [(wanted[0],)] and held.id not in engine.ends
        opened.set()
        engine.wait(held.id)


def test_repeat_samples_and_masks_like_single_steps(engine: Engine) -> None:
    sampling = Sampling(temperature=1.3, top_k=50, seed=11)
    plain = plain_run(engine, "a", PROMPT, 10, sampling=sampling)
    stops = (plain[2], plain[7])
    masked = plain_run(engine, "a", PROMPT, 10, sampling=sampling, stop_ids=stops, min_tokens=5)
    with resident(engine, "a", 12):
        first = engine.run(
            "a",
            [row(0, PROMPT, pages=PAGES, sample=sampling, stop_ids=stops, min_remaining=5)],
        )
        engine.do(first)
        second = row(
            len(PROMPT), None, sample=sampling, output_index=1, stop_ids=stops, min_remaining=4
        )
        run = engine.run("a", [second], repeat=9)
        engine.do(run)
    drawn = [t[0] for t in engine.drawn[first.id] + engine.drawn[run.id]]
    assert drawn == list(masked)
    assert not set(drawn[:5]) & set(stops)


def test_repeat_ends_with_the_first_finished_row(engine: Engine, wanted: list[int]) -> None:
    start(engine)
    stop = wanted[4]
    assert wanted.index(stop) == 4
    run = engine.run("a", [row(len(PROMPT), None, output_index=1, stop_ids=(stop,))], repeat=9)
    engine.do(run)
    assert [t[0] for t in engine.drawn[run.id]] == wanted[1:5]


def test_rows_of_all_kinds_in_one_step(engine: Engine, wanted: list[int]) -> None:
    """Decode beside whole prompts and chunks: each row draws what it would alone."""
    drawn = start(engine, tokens=3)
    other = [3, 50, 60, 70, 80]
    alone, _ = PlainModel(engine.models["a"].path, "float64").generate(other, 4)
    first = engine.run(
        "a",
        [
            row(0, other[:2], request=2, slot=5, pages=[12, 13, 14], sample=None),
            row(len(PROMPT) + 2, None, output_index=3),
        ],
    )
    engine.do(first)
    assert engine.drawn[first.id] == [(-1, wanted[3])]
    second = engine.run(
        "a",
        [
            row(len(PROMPT) + 3, None, output_index=4),
            row(2, other[2:], request=2, slot=5),
        ],
    )
    engine.do(second)
    third = engine.run(
        "a",
        [row(5, None, request=2, slot=5), row(len(PROMPT) + 4, None, output_index=5)],
        repeat=3,
    )
    engine.do(third)
    drawn += [wanted[3], engine.drawn[second.id][0][0], *(t[1] for t in engine.drawn[third.id])]
    assert drawn == wanted[:8]
    assert [engine.drawn[second.id][0][1], *(t[0] for t in engine.drawn[third.id])] == alone


def gate(engine_action: type[UnitAction]) -> tuple[threading.Event, Callable[[UnitAction], None]]:
    """A fault hook that holds actions of a kind until the event is set."""
    opened = threading.Event()

    def fault(action: UnitAction) -> None:
        if isinstance(action, engine_action):
            assert opened.wait(60)

    return opened, fault


def test_a_step_follows_the_load_of_its_model(
    models: dict[str, TinyModel], wanted: list[int]
) -> None:
    opened, fault = gate(Load)
    with Engine(models, unit_for(models), fault=fault) as engine:
        base = engine.weight_granules("a")
        engine.do(engine.map_kv("a", {i: base + i for i in range(8)}))
        load = engine.load("a", range(base))
        step = engine.run("a", [row(0, PROMPT, pages=PAGES)], follow=load.id)
        engine.submit(load)
        engine.submit(step)
        assert not engine.executor.poll()
        opened.set()
        engine.wait(load.id, step.id)
        assert engine.drawn[step.id] == [(wanted[0],)]


def test_a_step_fails_with_the_load_it_follows(models: dict[str, TinyModel]) -> None:
    def fault(action: UnitAction) -> None:
        if isinstance(action, Load):
            raise MemoryError("none left")

    with Engine(models, unit_for(models), fault=fault) as engine:
        base = engine.weight_granules("a")
        engine.do(engine.map_kv("a", {i: base + i for i in range(8)}))
        load = engine.load("a", range(base))
        step = engine.run("a", [row(0, PROMPT, pages=PAGES)], follow=load.id)
        late = engine.run("a", [row(len(PROMPT), None)], after=(step.id,))
        for action in (load, step, late):
            engine.submit(action)
        ends = engine.wait(load.id, step.id, late.id)
        assert isinstance(ends[0], Failed) and ends[0].retryable and "none left" in ends[0].cause
        assert cause(engine, step.id) == cause(engine, late.id) == "dependency"
        engine.executor.check_integrity(mapped={"a/kv": tuple(base + i for i in range(8))})


def test_an_interrupt_ends_a_repeat_early(models: dict[str, TinyModel]) -> None:
    inside, opened = threading.Event(), threading.Event()
    count = itertools.count()

    def tap(*_: object) -> None:
        if next(count) == 2:  # the prefill, one iteration, and in the middle of the next
            inside.set()
            assert opened.wait(60)

    with Engine(models, unit_for(models, max_repeat=16), logits_tap=tap) as engine:
        start(engine)
        run = engine.run("a", [row(len(PROMPT), None)], repeat=16)
        engine.submit(run)
        assert inside.wait(60)
        (end,) = engine.wait(engine.submit(Interrupt(id=engine.next_id(), target=run.id)))
        assert isinstance(end, Done), "an interrupt is done at once"
        opened.set()
        engine.wait(run.id)
        assert len(engine.drawn[run.id]) == 2
        late = engine.submit(Interrupt(id=engine.next_id(), target=run.id))
        assert isinstance(engine.wait(late)[0], Done), "an interrupt may come too late"


@pytest.mark.parametrize(
    ("error", "retryable"),
    [(OSError("link down"), True), (MemoryError(), True), (ArenaError("no"), False)],
)
def test_a_failing_action_fails_alone_with_what_waits_for_it(
    models: dict[str, TinyModel], wanted: list[int], error: Exception, retryable: bool
) -> None:
    failing: set[int] = set()

    def fault(action: UnitAction) -> None:
        if action.id in failing:
            raise error

    with Engine(models, unit_for(models), fault=fault) as engine:
        drawn = start(engine, tokens=2)
        bad = engine.run("a", [row(len(PROMPT) + 1, None, output_index=2)])
        behind = engine.run("a", [row(len(PROMPT) + 2, None)], after=(bad.id,))
        failing.add(bad.id)
        engine.submit(bad)
        engine.submit(behind)
        first, second = engine.wait(bad.id, behind.id)
        assert first == Failed(action=bad.id, cause=repr(error), retryable=retryable)
        assert second == Failed(action=behind.id, cause="dependency", retryable=True)
        drawn += decode(engine, 2, 4)
        assert drawn == wanted[:6], "a step may be run again"


def test_refusals_leave_everything_as_it_was(engine: Engine, wanted: list[int]) -> None:
    drawn = start(engine, tokens=2)
    base = engine.weight_granules("a")
    here = {"a/weights": tuple(range(base)), "a/kv": tuple(base + i for i in range(8))}
    end = len(PROMPT) + 1
    refused: list[UnitAction] = [
        engine.load("a", range(base)),
        engine.load("b", [*range(base, base + engine.weight_granules("b"))]),
        engine.load("b", [base + 20]),
        engine.map_kv("a", {7: base + 30}),
        engine.map_kv("b", {0: engine.unit.num_granules}),
        engine.unmap_kv("a", {0: base + 1}),
        engine.drop("b", [1]),
        engine.copy_kv("a", "host", [40], [Extent(0, 1 << 20)]),
        engine.copy_kv("a", "host", [0], [Extent(engine.host.num_bytes - 8, 1 << 20)]),
        engine.copy_kv("a", "host", [0, 1], [Extent(engine.unit.host_offset, 4100)]),
        engine.run("b", [row(0, [1])]),
        engine.run("a", [row(end, None, slot=99)]),
        engine.run("a", [row(end, [128])]),
        engine.run("a", [row(end, [-1])]),
        engine.run("a", [row(511, [1, 2])]),
        engine.run("a", [row(end, None), row(end, None, request=2)]),
        engine.run("a", [row(end, [1, 2])], repeat=2),
        engine.run("a", [row(end, None, sample=None)], repeat=2),
        engine.run("a", [row(end, None, pages=[50], first_page=3)]),
        engine.run("a", [row(end, None, pages=[1], first_page=200)]),
        engine.run("a", [row(0, [1] * 65)]),
        engine.run("a", []),
        engine.run("c", [row(0, [1])]),
    ]
    for action in refused:
        engine.submit(action)
        (failed,) = engine.wait(action.id)
        assert isinstance(failed, Failed) and not failed.retryable, (action, failed)
        assert failed.cause.startswith(("ArenaError", "ValueError")), failed
        engine.executor.check_integrity(mapped=here)
    with pytest.raises(AssertionError, match=r"a/kv\[1\]"):
        engine.executor.check_integrity(mapped={**here, "a/kv": (base,)})
    repaired = engine.run("a", [row(end, None, output_index=2, pages=[PAGES[3]], first_page=3)])
    engine.do(repaired)
    drawn.append(engine.drawn[repaired.id][0][0])
    assert drawn == wanted[:3]


def test_submit_refuses_what_only_a_bug_can_ask(engine: Engine) -> None:
    known = engine.submit(engine.map_kv("a", {0: 0}))
    engine.wait(known)
    with pytest.raises(ValueError, match="never submitted"):
        engine.submit(engine.unmap_kv("a", {0: 0}, after=(ActionId(999),)))
    with pytest.raises(ValueError, match="lane 3"):
        engine.submit(engine.run("a", [row(0, [1])], lane=3))


def test_a_flipped_bit_in_the_host_store_is_caught(engine: Engine) -> None:
    start(engine, tokens=3)
    spec = engine.models["a"].spec
    extent = Extent(engine.unit.host_offset, 4 * spec.page_bytes)
    engine.do(engine.copy_kv("a", "host", PAGES[:4], [extent]))
    engine.do(engine.copy_kv("a", "device", [12, 13, 14, 15], [extent]))
    with engine.host.view(extent.offset + spec.page_bytes * 2 + 7, 1) as byte:
        byte[0] ^= 0x10
    bad = engine.submit(engine.copy_kv("a", "device", [12, 13, 14, 15], [extent]))
    assert not getattr(engine.wait(bad)[0], "retryable", True)
    assert "KV page 2 differs" in cause(engine, bad)
    weights = range(engine.weight_granules("a"))
    engine.do(engine.drop("a", weights))
    place = engine.images["a"].offset + spec.weight_bytes - 5000
    with engine.host.view(place, 1) as byte:
        byte[0] ^= 1
    load = engine.load("a", weights)
    step = engine.run("a", [row(0, PROMPT, slot=1, pages=PAGES)], follow=load.id)
    engine.submit(load)
    engine.submit(step)
    engine.wait(load.id, step.id)
    assert "differs from its first load" in cause(engine, load.id)
    assert cause(engine, step.id) == "dependency", "a step in the middle of a broken load"
    kv = tuple(len(weights) + i for i in range(8))
    engine.executor.check_integrity(mapped={"a/kv": kv})
    with engine.host.view(place, 1) as byte:
        byte[0] ^= 1
    engine.do(engine.load("a", weights))


def test_close_ends_every_action_once(models: dict[str, TinyModel]) -> None:
    inside, opened = threading.Event(), threading.Event()

    def fault(action: UnitAction) -> None:
        if isinstance(action, Run):
            inside.set()
            assert opened.wait(60)

    engine = Engine(models, unit_for(models), fault=fault)
    base = engine.weight_granules("a")
    engine.do(engine.load("a", range(base)))
    engine.do(engine.map_kv("a", {i: base + i for i in range(8)}))
    runs = [engine.run("a", [row(0, PROMPT, pages=PAGES)])]
    runs.append(engine.run("a", [row(len(PROMPT), None)], repeat=9, after=(runs[0].id,)))
    runs.append(engine.run("b", [row(0, [1])]))  # ready at once, but behind the second
    drop = engine.drop("a", range(base), after=(runs[1].id,))
    for action in (*runs, drop):
        engine.submit(action)
    assert inside.wait(60)
    closer = threading.Thread(target=engine.executor.close)
    closer.start()
    waiting = {runs[1].id, drop.id}
    events = await_events(
        engine.executor, lambda seen: waiting <= {getattr(e, "action", -1) for e in seen}
    )
    engine.collect(events)
    opened.set()
    closer.join(60)
    assert not closer.is_alive()
    engine.collect(engine.executor.poll())
    assert {a: type(e) for a, e in engine.ends.items() if a >= runs[0].id} == {
        runs[0].id: StepDone,
        runs[1].id: Failed,
        runs[2].id: Failed,
        drop.id: Failed,
    }
    assert {cause(engine, a) for a in (runs[1].id, runs[2].id, drop.id)} == {"closed"}
    after = engine.map_kv("a", {0: 1})
    engine.executor.submit(after)
    assert engine.executor.poll() == (Failed(action=after.id, cause="closed"),)
    engine.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("weft-")]


def test_bind_checks_that_the_parts_fit(models: dict[str, TinyModel]) -> None:
    with Engine({"a": models["a"]}, unit_for(models)) as engine:
        b, image = models["b"], engine.images["a"]
        with pytest.raises(ValueError, match="the architecture needs"):
            engine.executor.bind(b.spec, b.arch, image)
        with pytest.raises(ArenaError, match="reserved already"):
            engine.executor.bind(models["a"].spec, models["a"].arch, image)
        engine.do(engine.map_kv("a", {0: 0}))
        with pytest.raises(ArenaError, match="still holds"):
            engine.executor.unbind(models["a"].spec.name)
        engine.do(engine.unmap_kv("a", {0: 0}))
        engine.executor.unbind(models["a"].spec.name)
        engine.executor.bind(models["a"].spec, models["a"].arch, image)
        plain_run(engine, "a", PROMPT, 2)


def test_is_end_tells_reports_from_ends() -> None:
    report = StepDone(action=ActionId(1), iterations=1, last=False, tokens=((1,),))
    assert not is_end(report) and is_end(Done(action=ActionId(1)))


@pytest.mark.parametrize("folder_dtype", ["bfloat16", "float32"])
def test_other_dtypes(tmp_path: Path, folder_dtype: str) -> None:
    models = tiny_models(tmp_path, {"a": {"dtype": folder_dtype}}, dtype="auto", page_tokens=16)
    alone, _ = PlainModel(models["a"].path, page_tokens=16).generate(PROMPT, 12)
    with Engine(models, unit_for(models)) as engine:
        assert list(plain_run(engine, "a", PROMPT, 12)) == alone

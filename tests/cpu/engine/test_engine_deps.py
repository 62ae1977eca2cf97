"""Dependencies and lane order under random graphs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.engine.deps import Dependencies, LaneOrder


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[tuple[int, ...], int | None]]:
    """Per action its `after` and `follow`, naming earlier ones only."""
    out: list[tuple[tuple[int, ...], int | None]] = []
    for i in range(draw(st.integers(1, 14))):
        earlier = st.integers(0, i - 1)
        after = draw(st.lists(earlier, max_size=4)) if i else []
        follow = draw(st.none() | earlier) if i else None
        out.append((tuple(after), follow))
    return out


@given(graphs(), st.data())
def test_random_graphs_end_each_once_in_order(
    graph: list[tuple[tuple[int, ...], int | None]], data: st.DataObject
) -> None:
    """Adds, ends and failures interleaved at random: order is respected, each ends exactly once,
    and what fails is what failed itself or named something failed that it had to wait for."""
    deps = Dependencies()
    running: list[int] = []
    ended: dict[int, bool] = {}
    own_failures: set[int] = set()
    added = 0

    def take(ready: tuple[int, ...], failed: tuple[int, ...]) -> None:
        for action in ready:
            assert action not in ended and action not in running
            assert all(ended.get(a) is True for a in graph[action][0])
            running.append(action)
        for action in failed:
            assert action not in ended and action not in running
            named = (*graph[action][0], graph[action][1])
            assert any(ended.get(a) is False or a in failed for a in named if a is not None)
            ended[action] = False

    while added < len(graph) or running:
        if added < len(graph) and (not running or data.draw(st.booleans())):
            after, follow = graph[added]
            released = deps.add(added, after, follow)
            added += 1
            take(released.ready, released.failed)
            continue
        action = running.pop(data.draw(st.integers(0, len(running) - 1)))
        ok = data.draw(st.sampled_from([True, True, True, False]))
        ended[action] = ok
        if not ok:
            own_failures.add(action)
        released = deps.finish(action, ok=ok)
        take(released.ready, released.failed)
    assert ended.keys() == set(range(len(graph)))
    assert deps.unfinished == 0 and deps.waiting() == ()
    for action, (after, follow) in enumerate(graph):
        if any(not ended[a] for a in after):
            assert not ended[action]
        if not ended[action] and action not in own_failures:
            assert any(not ended[a] for a in (*after, *(() if follow is None else (follow,))))


def test_failure_reaches_everything_behind_it_once() -> None:
    deps = Dependencies()
    assert deps.add(1, ()).ready == (1,)
    assert deps.add(2, (1,)).ready == ()
    assert deps.add(3, (2, 1)).ready == ()
    assert deps.add(4, ()).ready == (4,)
    assert deps.add(5, (4,), follow=2).ready == ()
    assert deps.finish(1, ok=False).failed == (2, 3, 5)
    assert deps.add(6, (3,)).failed == (6,)
    assert deps.add(7, (), follow=5).failed == (7,)
    assert deps.finish(4, ok=True).ready == ()
    assert deps.unfinished == 0


def test_follow_delays_nothing() -> None:
    deps = Dependencies()
    deps.add(1, ())
    assert deps.add(2, (), follow=1).ready == (2,)
    assert deps.finish(1, ok=False).failed == (), "2 runs: it must look for itself"
    assert deps.has_failed(1)
    assert deps.finish(2, ok=True).ready == ()


def test_bugs_of_the_caller_are_refused() -> None:
    deps = Dependencies()
    deps.add(5, ())
    with pytest.raises(ValueError, match="never submitted"):
        deps.add(6, (7,))
    with pytest.raises(ValueError, match="never submitted"):
        deps.add(6, (), follow=6)
    with pytest.raises(ValueError, match="twice"):
        deps.add(5, ())
    deps.finish(5, ok=True)
    with pytest.raises(KeyError):
        deps.finish(5, ok=True)
    assert deps.add(6, (3,)).ready == (6,), "an id of the past has ended"


def test_abandon_fails_what_waits_and_spares_what_runs() -> None:
    deps = Dependencies()
    deps.add(1, ())
    deps.add(2, (1,))
    assert deps.abandon() == (2,)
    assert deps.finish(1, ok=True).ready == ()
    assert deps.unfinished == 0


@given(st.permutations(range(8)), st.sets(st.integers(0, 7)))
def test_a_lane_keeps_the_order_of_submission(order: list[int], failing: set[int]) -> None:
    lane = LaneOrder()
    for action in range(8):
        lane.add(action)
    settled: set[int] = set()
    out: list[int] = []
    for action in order:
        settled.add(action)
        now = lane.failed(action) if action in failing else lane.ready(action)
        out.extend(now)
        first_open = min(set(range(9)) - settled)
        assert out == [a for a in range(first_open) if a not in failing]

"""The short way by which plain decode rows are planned."""

import pytest

from weft.core.actions import Run
from weft.sched.book import RequestState
from weft.sim.scenario import random_scenario, run_scenario

SEEDS = range(12)


def test_the_short_way_to_a_row_is_the_general_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every action is the same when no request is taken for a plain one."""
    short = [run_scenario(random_scenario(seed), check=False).trace for seed in SEEDS]
    rows = [
        row
        for trace in short
        for _, action in trace
        if isinstance(action, Run)
        for row in action.plan.rows
    ]
    assert sum(row.input is None for row in rows) > 100, "hardly a plain row among them"
    prepare = RequestState.__post_init__

    def none_is_plain(state: RequestState) -> None:
        prepare(state)
        state.plain = False

    monkeypatch.setattr(RequestState, "__post_init__", none_is_plain)
    assert [run_scenario(random_scenario(seed), check=False).trace for seed in SEEDS] == short

"""A load that failed is tried again; what failed only because of it does not count against it."""

import msgspec
import pytest

from weft.core.actions import Emit, Load, Run, UnitAction
from weft.core.events import Assign, Failed, Submit, UnitEvent
from weft.core.ids import ModelName, RequestId
from weft.core.model import ModelSpec
from weft.core.request import Request
from weft.core.unit import UnitSpec
from weft.policy.presets import preset
from weft.sched.scheduler import UnitScheduler

KIB = 1024
MODEL = ModelSpec(
    name=ModelName("m"),
    weight_bytes=64 * KIB,
    num_layers=1,
    page_tokens=4,
    page_bytes=4 * KIB,
    max_context_tokens=64,
    vocab_size=100,
)
REQUEST = Request(id=RequestId(1), model=MODEL.name, prompt=(1, 2), max_tokens=4)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_load_is_not_planned_behind_a_run_that_fails_with_the_load_before(pinned: bool) -> None:
    """The Run that followed the failed load ends a little later. A second load that waited for it
    would fail as its dependent, and after three such the model would be given up."""
    unit = UnitSpec(granule_bytes=16 * KIB, num_granules=8, host_bytes=0)
    scheduler = UnitScheduler(unit, preset("weft", turn_s=1.0))
    now_ns = 0

    def decide(*events: UnitEvent) -> list[UnitAction]:
        nonlocal now_ns
        now_ns += 1
        out = scheduler.handle(events, now_ns)
        assert not any(isinstance(item, Emit) for item in out)
        return [item for item in out if isinstance(item, UnitAction)]

    spec = msgspec.structs.replace(MODEL, pinned=pinned)
    actions = decide(Assign(model=spec), Submit(request=REQUEST))
    for _ in range(2):
        (load,) = (a for a in actions if isinstance(a, Load))
        runs = [a for a in actions if isinstance(a, Run)]
        assert load.after == ()
        assert runs[0].follow == load.id
        early = decide(Failed(action=load.id, cause="injected"))
        assert not any(isinstance(a, Load) for a in early), "the runs have not ended"
        actions = decide(*(Failed(action=run.id, cause="dependency") for run in runs))

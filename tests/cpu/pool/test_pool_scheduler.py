"""The pool's decisions, one by one. Its laws under any history: test_pool_machine.py."""

import msgspec
import pytest

from support.pool_cases import kv, model_status, request, spec, status
from weft.core import errors
from weft.core.actions import Emit
from weft.core.ids import ModelName, RequestId
from weft.core.request import FinishReason, ParkedKv, Sampling
from weft.policy.dispatch.least_loaded import LeastLoaded
from weft.pool import events as ev
from weft.pool.actions import (
    AssignTo,
    CancelAt,
    PoolAction,
    Reject,
    Reply,
    StartWorker,
    StopWorker,
    SubmitTo,
    UnassignFrom,
    WakeAt,
    WarmAt,
)
from weft.pool.scheduler import PoolScheduler
from weft.pool.units import NS, Limits


class Pool:
    """A PoolScheduler with short words for what happens to it."""

    def __init__(self, units: int = 1, models: str = "m", *, up: bool = True, **limits: float):
        self.now_ns = 0
        self.wake_ns = 0
        """The last time a wake was asked for; these actions are left out below."""
        self.brain = PoolScheduler(LeastLoaded(), Limits(**limits))  # type: ignore[arg-type]
        self.do(*(ev.ModelAdded(spec=spec(name)) for name in models))
        self.do(*(ev.UnitAdded(unit=unit) for unit in range(units)))
        if up:
            self.do(*(ev.ModelReady(model=ModelName(name)) for name in models))
            for unit in range(units):
                self.up(unit)

    def do(self, *events: ev.PoolEvent) -> list[PoolAction]:
        actions = self.brain.handle(events, self.now_ns)
        for action in actions:
            if isinstance(action, WakeAt):
                self.wake_ns = action.at_ns
        return [action for action in actions if not isinstance(action, WakeAt)]

    def inc(self, unit: int) -> int:
        return self.brain.units[unit].incarnation

    def new(self, i: int, model: str = "m", **more: object) -> list[PoolAction]:
        return self.do(ev.NewRequest(request=request(i, model, **more)))  # type: ignore[arg-type]

    def up(self, unit: int = 0) -> list[PoolAction]:
        return self.do(ev.UnitUp(unit=unit, incarnation=self.inc(unit)))

    def lost(self, unit: int = 0, cause: str = "boom") -> list[PoolAction]:
        return self.do(ev.UnitLost(unit=unit, incarnation=self.inc(unit), cause=cause))

    def emit(
        self,
        i: int,
        *tokens: int,
        finish: FinishReason | None = None,
        error: str | None = None,
        unit: int = 0,
        incarnation: int | None = None,
    ) -> list[PoolAction]:
        emit = Emit(request=RequestId(i), tokens=tokens, finish=finish, error=error)
        return self.do(ev.Emitted(unit=unit, incarnation=incarnation or self.inc(unit), emit=emit))

    def stepping(self, *ids: int, unit: int = 0) -> None:
        requests = tuple(RequestId(i) for i in ids)
        self.do(ev.Stepping(unit=unit, incarnation=self.inc(unit), requests=requests))

    def parked(self, i: int, where: ParkedKv, unit: int = 0) -> None:
        self.do(
            ev.KvParkedAt(unit=unit, incarnation=self.inc(unit), request=RequestId(i), kv=where)
        )


def submits(actions: list[PoolAction]) -> list[SubmitTo]:
    return [a for a in actions if isinstance(a, SubmitTo)]


def only(actions: list[PoolAction], kind: type) -> PoolAction:
    (action,) = [a for a in actions if isinstance(a, kind)]
    return action


def code(actions: list[PoolAction], kind: type = Reply) -> str:
    action = only(actions, kind)
    assert isinstance(action, Reply | Reject) and action.error is not None
    return action.error.code


def test_a_request_waits_for_its_image_and_for_a_worker() -> None:
    pool = Pool(up=False)
    assert pool.new(1) == []
    ready = pool.do(ev.ModelReady(model=ModelName("m")))
    assert ready == []
    actions = pool.up()
    assert actions == [
        AssignTo(unit=0, incarnation=1, model=spec("m")),
        SubmitTo(unit=0, incarnation=1, request=request(1)),
    ]


def test_a_model_that_becomes_ready_later_is_assigned_then() -> None:
    pool = Pool(up=False)
    pool.up()
    pool.new(1)
    actions = pool.do(ev.ModelReady(model=ModelName("m")))
    assert [type(a) for a in actions] == [AssignTo, SubmitTo]


def test_tokens_reach_the_client_and_the_end_frees_the_record() -> None:
    pool = Pool()
    pool.new(1)
    assert pool.emit(1, 7, 8) == [Reply(request=RequestId(1), tokens=(7, 8))]
    assert pool.emit(1, 9, finish="stop") == [
        Reply(request=RequestId(1), tokens=(9,), finish="stop")
    ]
    assert len(pool.brain.journal) == 0
    assert pool.emit(1, 10) == []


def test_an_error_of_the_unit_keeps_its_code() -> None:
    pool = Pool()
    pool.new(1)
    assert code(pool.emit(1, finish="error", error="hold_deadline: too late")) == "hold_deadline"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"model": "nobody"}, errors.MODEL_NOT_FOUND),
        ({"model": "broken"}, errors.MODEL_FAILED),
        ({"prompt": ()}, errors.INVALID_REQUEST),
        ({"prompt": (1, 1000)}, errors.INVALID_REQUEST),
        ({"prompt": (-1,)}, errors.INVALID_REQUEST),
        ({"max_tokens": 0}, errors.INVALID_REQUEST),
        ({"max_tokens": 510}, errors.CONTEXT_LENGTH),
    ],
)
def test_refusals(more: dict[str, object], expected: str) -> None:
    pool = Pool()
    pool.do(ev.ModelFailed(model=ModelName("broken"), reason="torn"))
    assert code(pool.do(ev.NewRequest(request=request(1, **more))), Reject) == expected  # type: ignore[arg-type]
    assert len(pool.brain.journal) == 0


def test_one_models_crowd_does_not_keep_out_the_others() -> None:
    pool = Pool(models="mn", max_queue=8)
    for i in range(1, 7):
        pool.new(i)
    assert code(pool.new(7), Reject) == errors.QUEUE_FULL
    assert submits(pool.new(8, "n"))
    alone = Pool(models="m", max_queue=8)
    assert all(submits(alone.new(i)) for i in range(1, 9))
    own = Pool(models="mn", max_queue=8, max_model_queue=1)
    own.new(1)
    assert code(own.new(2), Reject) == errors.QUEUE_FULL
    own.do(ev.ClientGone(request=RequestId(1)))
    own.emit(1, finish="cancelled")
    assert submits(own.new(3))


def test_the_queue_is_bounded() -> None:
    pool = Pool(max_queue=2)
    pool.new(1)
    pool.new(2)
    assert code(pool.new(3), Reject) == errors.QUEUE_FULL
    pool.emit(1, 5, finish="length")
    assert submits(pool.new(4))


def test_draining_refuses_new_ones_and_finishes_the_others() -> None:
    pool = Pool()
    pool.new(1)
    pool.do(ev.DrainPool())
    assert code(pool.new(2), Reject) == errors.DRAINING
    assert only(pool.emit(1, 3, finish="stop"), Reply)


def test_a_client_that_leaves() -> None:
    pool = Pool()
    pool.new(1)
    gone = ev.ClientGone(request=RequestId(1))
    assert pool.do(gone) == [
        CancelAt(unit=0, incarnation=1, request=RequestId(1)),
        Reply(request=RequestId(1), finish="cancelled"),
    ]
    assert pool.do(gone) == []
    assert pool.emit(1, 5) == []
    assert len(pool.brain.journal) == 1
    assert pool.emit(1, finish="cancelled") == []
    assert len(pool.brain.journal) == 0


def test_a_client_that_leaves_while_held() -> None:
    pool = Pool(up=False)
    pool.new(1)
    actions = pool.do(ev.ClientGone(request=RequestId(1)))
    assert actions == [Reply(request=RequestId(1), finish="cancelled")]
    pool.do(ev.ModelReady(model=ModelName("m")))
    assert not submits(pool.up())


def test_a_held_request_has_a_deadline_to_begin() -> None:
    pool = Pool(up=False)
    pool.new(1, hold_deadline_ns=50)
    assert pool.wake_ns == 50
    pool.now_ns = 50
    assert code(pool.do(ev.Woke())) == errors.HOLD_DEADLINE


def test_a_request_that_has_begun_has_no_deadline_any_more() -> None:
    pool = Pool()
    pool.new(1, hold_deadline_ns=50)
    pool.emit(1, 7)
    pool.now_ns = 60
    pool.lost()
    (submit,) = submits(pool.up())
    assert submit.request.hold_deadline_ns is None and submit.emitted == (7,)


def test_a_lost_worker_is_replaced_and_its_requests_go_on() -> None:
    pool = Pool()
    pool.new(1)
    pool.new(2)
    pool.emit(1, 7)
    pool.parked(2, kv())
    assert only(pool.lost(), StartWorker) == StartWorker(unit=0, incarnation=2)
    actions = pool.up()
    assert isinstance(actions[0], AssignTo)
    first, second = submits(actions)
    assert first.emitted == (7,) and first.resume is None
    assert second.resume == kv()
    assert pool.emit(1, 9, incarnation=1) == []
    assert pool.emit(1, 8) == [Reply(request=RequestId(1), tokens=(8,))]


def test_a_rerun_is_the_request_itself_but_for_its_number_and_deadline() -> None:
    """Another seed, or a stop id less, would contradict what the client has already."""
    pool = Pool()
    first = msgspec.structs.replace(
        request(1, hold_deadline_ns=50),
        sampling=Sampling(temperature=0.8, top_p=0.9, top_k=7, seed=12345),
        stop_ids=(3, 4),
        min_tokens=2,
        priority=1,
    )
    (submit,) = submits(pool.do(ev.NewRequest(request=first)))
    assert submit.request == first
    pool.emit(1, 7)
    pool.stepping(1)
    pool.lost()
    (again,) = submits(pool.up())
    assert again.request == msgspec.structs.replace(first, reruns=1, hold_deadline_ns=None)


def test_parked_kv_that_is_gone_is_not_resumed() -> None:
    pool = Pool()
    pool.new(1)
    pool.parked(1, kv())
    pool.do(ev.KvGoneAt(unit=0, incarnation=1, request=RequestId(1)))
    pool.lost()
    (submit,) = submits(pool.up())
    assert submit.resume is None


def test_parked_kv_outlives_two_deaths_if_nobody_said_it_is_gone() -> None:
    pool = Pool(backoff_s=0.0)
    pool.new(1)
    pool.parked(1, kv())
    pool.lost()
    pool.up()
    pool.lost()
    (submit,) = submits(pool.up())
    assert submit.resume == kv()


def test_a_request_goes_to_another_unit_unless_its_kv_waits_at_home() -> None:
    pool = Pool(units=2)
    pool.new(1)
    pool.new(2)
    pool.new(3)
    assert [pool.brain.journal.get(RequestId(i)).unit for i in (1, 2, 3)] == [0, 1, 0]  # type: ignore[union-attr]
    pool.parked(1, kv())
    actions = pool.lost(0)
    assert [(s.request.id, s.unit) for s in submits(actions)] == [(3, 1)]
    (submit,) = submits(pool.up(0))
    assert (submit.request.id, submit.unit, submit.resume) == (1, 0, kv())


def test_a_request_leaves_its_kv_behind_when_its_unit_is_down() -> None:
    pool = Pool(units=2, max_failures=1)
    pool.new(1)
    pool.parked(1, kv())
    pool.lost(0)  # it had done something: not a failure
    (submit,) = submits(pool.lost(0))
    assert (submit.unit, submit.resume) == (1, None)


def test_a_request_that_kills_its_worker_fails_alone() -> None:
    pool = Pool(backoff_s=0.0)
    pool.new(1)
    pool.new(2)
    for _ in range(2):
        pool.stepping(1)
        assert not [a for a in pool.lost() if isinstance(a, Reply)]
        submits(pool.up())
    pool.stepping(1)
    failed = only(pool.lost(cause="killed by signal 11"), Reply)
    assert isinstance(failed, Reply) and failed.request == 1
    assert failed.error is not None and failed.error.code == errors.REQUEST_FAILED
    (submit,) = submits(pool.up())
    assert submit.request.id == 2 and submit.request.reruns == 0


def test_suspects_run_one_after_the_other_before_one_of_them_fails() -> None:
    pool = Pool(backoff_s=0.0)
    for i in (1, 2, 3):
        pool.new(i)
    pool.parked(3, kv())
    for _ in range(2):
        pool.stepping(1, 2, 3)
        pool.lost()
        actions = pool.up()
    assert [s.request.id for s in submits(actions)] == [1]
    (second,) = submits(pool.emit(1, 7))  # 1 is cleared, 2 comes under probation
    assert second.request.id == 2
    pool.stepping(1, 2)
    assert only(pool.lost(), Reply) == Reply(
        request=RequestId(2),
        finish="error",
        error=errors.ReplyError(
            code=errors.REQUEST_FAILED,
            message="the worker died 3 times while it ran this request (boom)",
        ),
    )
    first, third = submits(pool.up())
    assert first.emitted == (7,) and first.request.reruns == 3
    assert third.resume is None, "its unit had begun another life without it"


def test_all_are_suspects_of_a_worker_that_never_began_a_step() -> None:
    pool = Pool(backoff_s=0.0)
    pool.new(1)
    pool.new(2)
    for _ in range(2):
        pool.lost()
        actions = pool.up()
    assert [s.request.id for s in submits(actions)] == [1]
    assert code(pool.lost()) == errors.REQUEST_FAILED
    assert [s.request.id for s in submits(pool.up())] == [2]


def test_progress_clears_a_suspect_but_not_for_ever() -> None:
    pool = Pool(backoff_s=0.0, max_reruns_total=4)
    pool.new(1, max_tokens=100)
    for token in range(4):
        pool.emit(1, token)
        pool.stepping(1)
        pool.lost()
        (submit,) = submits(pool.up())
        assert submit.request.reruns == token + 1
    pool.emit(1, 9)
    pool.stepping(1)
    assert code(pool.lost()) == errors.REQUEST_FAILED


def test_restarts_back_off_and_then_the_unit_is_down() -> None:
    pool = Pool(up=False, max_failures=3, backoff_s=1.0, down_retry_s=60.0)
    pool.do(ev.ModelReady(model=ModelName("m")))
    pool.new(1)
    pool.lost()
    assert pool.wake_ns == NS
    pool.now_ns = NS
    assert only(pool.do(ev.Woke()), StartWorker) == StartWorker(unit=0, incarnation=2)
    pool.lost()
    assert pool.wake_ns == 3 * NS
    pool.now_ns = 3 * NS
    pool.do(ev.Woke())
    assert code(pool.lost(cause="no device")) == errors.MODEL_FAILED
    assert code(pool.new(2), Reject) == errors.MODEL_FAILED
    pool.now_ns = 63 * NS
    assert only(pool.do(ev.Woke()), StartWorker)
    assert code(pool.new(3), Reject) == errors.MODEL_FAILED
    pool.up()
    assert submits(pool.new(4))


def test_an_action_done_is_progress_and_restarts_at_once() -> None:
    pool = Pool()
    pool.do(ev.UnitReport(unit=0, incarnation=1, status=status(actions_done=1)))
    assert only(pool.lost(), StartWorker)


def test_a_failed_model_takes_its_requests_with_it() -> None:
    pool = Pool(models="mn")
    pool.new(1, "m")
    pool.new(2, "n")
    actions = pool.do(ev.ModelFailed(model=ModelName("m"), reason="torn"))
    assert actions == [UnassignFrom(unit=0, incarnation=1, model=ModelName("m"))]
    assert code(pool.lost()) == errors.MODEL_FAILED
    pool.now_ns = NS
    pool.do(ev.Woke())
    assert [s.request.id for s in submits(pool.up())] == [2]


def test_a_silent_worker_is_killed() -> None:
    pool = Pool(silent_s=5.0)
    pool.now_ns = 100 * NS
    pool.new(1)
    assert pool.wake_ns == 105 * NS
    pool.now_ns = 104 * NS
    pool.emit(1, 3)
    pool.now_ns = 105 * NS
    assert pool.do(ev.Woke()) == []
    assert pool.wake_ns == 109 * NS
    pool.now_ns = 109 * NS
    assert pool.do(ev.Woke()) == [StopWorker(unit=0, incarnation=1)]
    assert not submits(pool.new(2))
    assert len(submits([*pool.lost(), *pool.up()])) == 2


def test_a_last_token_without_an_end_ends_at_the_length() -> None:
    pool = Pool()
    pool.new(1, max_tokens=2)
    pool.emit(1, 5, 6)
    assert only(pool.lost(), Reply) == Reply(request=RequestId(1), finish="length")


def test_a_wish_goes_to_where_the_model_is_so_that_its_unit_reports() -> None:
    pool = Pool(units=2)
    report = status(models=(model_status("m", "resident"),))
    pool.do(ev.UnitReport(unit=1, incarnation=1, status=report))
    told = only(pool.do(ev.WarmModel(model=ModelName("m"))), WarmAt)
    assert told == WarmAt(unit=1, incarnation=1, model=ModelName("m"))


def test_dispatch_counts_at_once_and_prefers_where_the_model_is() -> None:
    pool = Pool(units=3)
    report = status(models=(model_status("m", "loading"),))
    pool.do(ev.UnitReport(unit=2, incarnation=1, status=report))
    units = [submits(pool.new(i))[0].unit for i in range(1, 5)]
    assert units == [2, 0, 1, 2]

"""Steps on their lanes: launch, let repeats go on, report what the device has passed.

Called by the worker loop only.
"""

import time
from collections.abc import Callable

from weft.core.actions import Run, UnitAction, finishes
from weft.core.ids import ActionId, ModelName
from weft.engine.book import ActionBook, DependencyFailed, LoadProgress
from weft.engine.cuda_device import Device, Stream
from weft.engine.cuda_order import Lane, Marks, Running
from weft.engine.cuda_verify import Verifier
from weft.engine.model import BoundModel
from weft.engine.step import step_done

AHEAD = 2
"""Iterations of a repeated step launched before the first is known: the device never idles."""


class Steps:
    """`begin` is called before an action is executed and may raise; `fail` ends one."""

    def __init__(
        self,
        book: ActionBook,
        device: Device,
        marks: Marks,
        verifier: Verifier | None,
        find_model: Callable[[ModelName], BoundModel],
        begin: Callable[[UnitAction], None],
        fail: Callable[[ActionId, Exception], None],
    ) -> None:
        self._book, self._device, self._marks = book, device, marks
        self._verifier = verifier
        self._model, self._begin, self._fail = find_model, begin, fail

    def launch_ready(self, lane: Lane) -> None:
        """Launch steps in order, up to one whose load has not queued all its copies yet, or whose
        grammar waits for its tokenizer."""
        while lane.ready:
            action = lane.ready[0]
            try:
                progress = self._book.following(action)
                model = self._model(action.plan.model)
                if progress is not None and progress.extents < len(model.layout.extents):
                    return
                if not lane.runner.ready(model, action.plan, self._book.wake):
                    return
                lane.ready.popleft()
                self._begin(action)
                if self._verifier is not None:
                    self._verifier.check_step(action.plan, model, weights=progress is None)
                self._launch(lane, action, model, progress)
            except Exception as error:
                if lane.ready and lane.ready[0] is action:
                    lane.ready.popleft()
                self._fail(action.id, error)

    def _launch(
        self, lane: Lane, action: Run, model: BoundModel, progress: LoadProgress | None
    ) -> None:
        self._marks.queue_behind(action.after, lane.stream)
        with lane.stream.use():
            step = lane.runner.prepare(model, action.plan)
            running = Running(action, step)
            follow = None if progress is None else _follows(lane.stream, progress)
            try:
                self._iterate(lane, running, follow)
            except BaseException:
                self._give_up(lane, running)
                raise
        lane.running.append(running)
        self._fill(lane, running)

    def _iterate(
        self, lane: Lane, running: Running, follow: Callable[[int], None] | None = None
    ) -> None:
        begin = lane.stream.record()
        lane.runner.iterate(running.step, follow)
        running.marks.append((begin, lane.record()))

    def _fill(self, lane: Lane, running: Running) -> None:
        """Launch further iterations of a repeated step, or say that it is issued."""
        if running.issued:
            return
        plan, action = running.action.plan, running.action
        try:
            while not running.issued:
                if running.step.launched == plan.repeat or self._book.interrupted(action.id):
                    self._seal(lane, running)
                elif len(running.marks) >= AHEAD:
                    return
                else:
                    with lane.stream.use():
                        self._iterate(lane, running)
        except Exception as error:
            self._give_up(lane, running)
            lane.running.remove(running)
            self._fail(action.id, error)

    def _seal(self, lane: Lane, running: Running) -> None:
        running.issued = True
        action = running.action.id
        if running.marks:
            self._marks.put(action, lane.stream, running.marks[-1][1])
        self._book.issue(action)

    def _give_up(self, lane: Lane, running: Running) -> None:
        """A launch failed: the step's buffers are free only when the device is past it."""
        lane.stream.synchronize()
        running.step.release()

    def advance(self, lane: Lane) -> bool:
        """Report the iterations the device has passed; whether a Run ended."""
        count = len(lane.running)
        for running in list(lane.running):
            try:
                while running.marks and running.marks[0][1].query():
                    if not self._may_report(running.action):
                        break
                    begin, end = running.marks.popleft()
                    self._complete(lane, running, self._device.elapsed_ns(begin, end))
            except DependencyFailed as error:
                self._give_up(lane, running)
                lane.running.remove(running)
                self._fail(running.action.id, error)
                continue
            self._fill(lane, running)
        return len(lane.running) < count

    def _may_report(self, action: Run) -> bool:
        """Not before what it followed has ended; raises DependencyFailed if its load failed."""
        return not self._book.any_in_flight(action.after) and self._book.following(action) is None

    def _complete(self, lane: Lane, running: Running, device_ns: int) -> None:
        action, step = running.action, running.step
        tokens = step.tokens(running.completed)
        stop = finishes(action.plan, running.completed, tokens)
        running.completed += 1
        if not running.issued and (stop or self._book.interrupted(action.id)):
            self._seal(lane, running)
        last = running.issued and not running.marks
        event = step_done(
            action,
            step,
            range(running.completed - 1, running.completed),
            last=last,
            token_ns=(time.monotonic_ns(),),
            device_ns=device_ns,
        )
        if not last:
            self._book.report(event)
            return
        step.release()
        lane.running.remove(running)
        self._marks.remove(action.id)
        self._book.end(event)


def _follows(stream: Stream, progress: LoadProgress) -> Callable[[int], None]:
    """The decoder announces part i (-1: embedding); extent i + 1 of the image holds it."""

    def before_layer(part: int) -> None:
        stream.wait(progress.wait(part + 1))

    return before_layer

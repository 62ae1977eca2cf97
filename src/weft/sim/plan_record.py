"""The plan log of a run: which steps were submitted, and what they drew."""

from collections.abc import Iterable

import msgspec

from weft.core.actions import Run, StepPlan, UnitAction
from weft.core.events import StepDone, UnitEvent
from weft.core.ids import ActionId


class RecordedStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step as it was submitted, and what it drew."""

    plan: StepPlan
    tokens: tuple[tuple[int, ...], ...]
    """Per iteration what each row drew, -1 where it did not sample."""


class PlanRecorder:
    """Keeps the plan log: tell it every action submitted and every event."""

    def __init__(self) -> None:
        self._plans: dict[ActionId, StepPlan] = {}
        self._tokens: dict[ActionId, list[tuple[int, ...]]] = {}
        self._done: set[ActionId] = set()

    def submitted(self, action: UnitAction) -> None:
        if isinstance(action, Run):
            self._plans[action.id] = action.plan
            self._tokens[action.id] = []

    def ended(self, events: Iterable[UnitEvent]) -> None:
        for event in events:
            if isinstance(event, StepDone):
                self._tokens[event.action].extend(event.tokens)
                if event.last:
                    self._done.add(event.action)

    def record(self) -> tuple[RecordedStep, ...]:
        """The finished steps in the order of submission; failed ones had no effect."""
        return tuple(
            RecordedStep(plan=plan, tokens=tuple(self._tokens[action]))
            for action, plan in self._plans.items()
            if action in self._done
        )

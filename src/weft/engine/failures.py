"""How an exception inside an executor becomes a Failed event."""

from weft.core.events import Failed
from weft.core.ids import ActionId
from weft.engine.book import CLOSED, DEPENDENCY, DependencyFailed, ExecutorClosed
from weft.engine.checksums import ChecksumError
from weft.memory.base import ArenaError

_CONTRADICTIONS = (ArenaError, ChecksumError, ValueError, TypeError, LookupError, AssertionError)
"""Failures that would come again: a contradiction between scheduler and executor, or bytes that
are wrong. Everything else (memory, the system, a kernel) may pass: retryable."""


def failure(action: ActionId, error: BaseException) -> Failed:
    """The event for an action that ended in `error`."""
    if isinstance(error, DependencyFailed):
        return Failed(action=action, cause=DEPENDENCY)
    if isinstance(error, ExecutorClosed):
        return Failed(action=action, cause=CLOSED)
    return Failed(
        action=action, cause=repr(error), retryable=not isinstance(error, _CONTRADICTIONS)
    )

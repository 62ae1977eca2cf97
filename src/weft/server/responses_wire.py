"""The shapes of /v1/responses: output items, and the documented order of a stream's events."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from weft.server import wire
from weft.server.choice import Choice, Piece
from weft.server.errors import ApiError
from weft.server.tools.deltas import CallDelta, Delta, Reader

Event = tuple[str, dict[str, Any]]


class _Items:
    """Output items in the making. Every change yields the events that tell of it."""

    def __init__(self, request_id: str) -> None:
        self.items: list[dict[str, Any]] = []
        self._request_id = request_id
        self._open: dict[str, Any] | None = None
        self._text = ""
        self._call = -1

    def add(self, delta: Delta) -> list[Event]:
        if delta.call is not None:
            return self._add_call(delta.call)
        if delta.reasoning:
            return self._add_text("reasoning", delta.reasoning)
        return self._add_text("message", delta.content) if delta.content else []

    def close(self, status: str = "completed") -> list[Event]:
        """Ends the item in hand."""
        item, self._open = self._open, None
        if item is None:
            return []
        item["status"] = status
        text, self._text = self._text, ""
        at = self._place(item)
        events: list[Event] = []
        if item["type"] == "function_call":
            item["arguments"] = text
            done = {**at, "name": item["name"], "arguments": text}
            events.append(("response.function_call_arguments.done", done))
        else:
            item["content"] = [_part(item, text)]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            end: dict[str, Any] = {**at, "content_index": 0, "text": text}
            if kind == "output_text":
                end["logprobs"] = []
            part = {**at, "content_index": 0, "part": item["content"][0]}
            events += [
                (f"response.{kind}.done", end),
                ("response.content_part.done", part),
            ]
        return [*events, ("response.output_item.done", self._item_event(item))]

    def _add_call(self, call: CallDelta) -> list[Event]:
        events: list[Event] = []
        if call.id is not None:
            events += self.close()
            item = {
                "type": "function_call",
                "id": self._new_id("fc"),
                "call_id": call.id,
                "name": call.name,
                "arguments": "",
                "status": "in_progress",
            }
            events += self._begin(item)
        if call.arguments and self._open is not None:
            self._text += call.arguments
            more = {**self._place(self._open), "delta": call.arguments}
            events.append(("response.function_call_arguments.delta", more))
        return events

    def _add_text(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open["type"] != kind:
            events += self.close()
            item: dict[str, Any] = {
                "type": kind,
                "id": self._new_id("msg" if kind == "message" else "rs"),
            }
            item |= {"role": "assistant"} if kind == "message" else {"summary": []}
            events += self._begin(item | {"status": "in_progress", "content": []})
            assert self._open is not None
            part = {**self._place(self._open), "content_index": 0, "part": _part(item, "")}
            events.append(("response.content_part.added", part))
        assert self._open is not None
        self._text += text
        more: dict[str, Any] = {**self._place(self._open), "content_index": 0, "delta": text}
        if kind == "message":
            more["logprobs"] = []
        name = "output_text" if kind == "message" else "reasoning_text"
        return [*events, (f"response.{name}.delta", more)]

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        self.items.append(item)
        self._open = item
        return [("response.output_item.added", self._item_event(dict(item)))]

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._request_id}_{len(self.items)}"

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self.items) - 1}

    def _item_event(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"output_index": len(self.items) - 1, "item": item}


def _part(item: dict[str, Any], text: str) -> dict[str, Any]:
    if item["type"] == "message":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": text}


class ResponseWriter:
    """One response, streamed or whole."""

    def __init__(self, told: dict[str, Any], reader: Callable[[], Reader], request_id: str) -> None:
        """`told`: what is repeated of the request."""
        self._told = told
        self._id = f"resp_{request_id}"
        self._created_s = int(time.time())
        self._reader = reader()
        self._items = _Items(request_id)
        self._sequence = 0

    def opening(self) -> bytes:
        begun = {"response": self._response("in_progress", ())}
        return self._events([("response.created", begun), ("response.in_progress", begun)])

    def chunk(self, choice: Choice, piece: Piece, choices: Sequence[Choice]) -> bytes:
        events = [event for d in self._reader.push(piece.text) for event in self._items.add(d)]
        return self._events(events)

    def closing(self, choices: Sequence[Choice]) -> bytes:
        status = self._status(choices)
        events = [event for d in self._reader.finish() for event in self._items.add(d)]
        events += self._items.close(status)
        last = {"response": self._response(status, choices)}
        return self._events([*events, (f"response.{status}", last)])

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Piece]) -> bytes:
        status = self._status(choices)
        for delta in (*self._reader.push(pieces[0].text), *self._reader.finish()):
            self._items.add(delta)
        self._items.close(status)
        return msgspec.json.encode(self._response(status, choices))

    def failure(self, error: ApiError) -> bytes:
        response = self._response("failed", ())
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._events([("response.failed", {"response": response})])

    def _status(self, choices: Sequence[Choice]) -> str:
        return "incomplete" if choices[0].outcome == "length" else "completed"

    def _events(self, events: Sequence[Event]) -> bytes:
        out = b""
        for name, fields in events:
            value = {"type": name, "sequence_number": self._sequence, **fields}
            out += wire.event(value, name)
            self._sequence += 1
        return out

    def _response(self, status: str, choices: Sequence[Choice]) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": cut,
            "max_tool_calls": None,
            "output": list(self._items.items),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "top_logprobs": 0,
            "truncation": "disabled",
            "usage": _usage(choices) if choices else None,
            "user": None,
            **self._told,
        }


def _usage(choices: Sequence[Choice]) -> dict[str, Any]:
    used = wire.usage(choices)
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": used["prompt_tokens_details"],
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used["total_tokens"],
    }

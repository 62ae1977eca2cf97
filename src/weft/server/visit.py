"""One HTTP request as the door knows it: who asks, what for, what came of it. Never its content.

The door puts it into `request.state.visit` and into a context variable, which is how `DoorHub`
learns for whom a request is opened. Outside of requests there is none.
"""

from contextvars import ContextVar
from dataclasses import dataclass

from weft.server.keys import Key


@dataclass(slots=True, eq=False)
class Visit:
    request_id: str
    arrival_s: float
    key: Key | None = None
    opened: int = 0
    """Hub requests opened for it."""
    model: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None
    status: int = 0
    body_bytes: int = 0
    """Of its body that was read; 0 once what it asks for is in the hub."""
    outcome: str = ""
    """How its answers ended: stop, length, error, cancelled."""
    left: bool = False
    """The client closed the connection before its answer was whole."""


current_visit: ContextVar[Visit | None] = ContextVar("weft_visit", default=None)

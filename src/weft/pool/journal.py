"""The journal: prompt and emitted tokens of every unfinished request, and where it is.

The pool is the one owner of record: whatever happens to a worker, a request can be run again from
here, continuing after the tokens its client already has.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from weft.core.ids import ModelName, RequestId
from weft.core.request import ParkedKv, Request


@dataclass(slots=True)
class Record:
    """One unfinished request. Held (unit is None) or placed at one incarnation of a unit."""

    request: Request
    emitted: list[int] = field(default_factory=list)
    unit: int | None = None
    parked_unit: int | None = None
    """The unit in whose host region `parked` lies."""
    parked: ParkedKv | None = None
    gone: bool = False
    """The client left and has its last reply; the unit has yet to confirm."""
    deaths: int = 0
    """Workers that died with this request in a step, all told."""
    deaths_here: int = 0
    """Of these, the ones since the request last made progress (a token emitted)."""

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def tokens(self) -> int:
        """What is placed on a unit with this request: prompt and the longest output."""
        return len(self.request.prompt) + self.request.max_tokens

    def forget_parked(self) -> None:
        self.parked = self.parked_unit = None

    def to_submit(self) -> Request:
        """The request as a unit gets it: a re-run knows its number, and one that has begun in its
        client's eyes has no deadline to begin by."""
        deadline = self.request.hold_deadline_ns if not self.emitted else None
        if self.deaths == self.request.reruns and deadline == self.request.hold_deadline_ns:
            return self.request
        return msgspec.structs.replace(self.request, reruns=self.deaths, hold_deadline_ns=deadline)


class Journal:
    """Records by id, in the order of admission."""

    def __init__(self) -> None:
        self._records: dict[RequestId, Record] = {}
        self._of_model: Counter[ModelName] = Counter()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def of_model(self, model: ModelName) -> int:
        """Unfinished requests of one model."""
        return self._of_model[model]

    def get(self, request: RequestId) -> Record | None:
        return self._records.get(request)

    def admit(self, request: Request) -> Record:
        """Raises ValueError on an id that is already here."""
        if request.id in self._records:
            raise ValueError(f"request {request.id} was admitted twice")
        record = self._records[request.id] = Record(request)
        self._of_model[request.model] += 1
        return record

    def remove(self, request: RequestId) -> None:
        model = self._records.pop(request).request.model
        self._of_model[model] -= 1
        if not self._of_model[model]:
            del self._of_model[model]

"""The hub as the key of the current request may use it.

Every route reaches models through this, so none can forget: a model the key may not use does not
exist for it, what it opens carries its tenant and priority, and tokens are charged as they come.
"""

import time
from collections.abc import AsyncIterator, Callable

import msgspec

from weft.core.errors import MODEL_NOT_FOUND, RATE_LIMIT, ReplyError
from weft.core.ids import RequestId
from weft.hub.base import (
    Chunk,
    Health,
    Hub,
    HubRefusal,
    ModelCard,
    NewRequest,
    PoolView,
    Unfetched,
)
from weft.server.keys import Key
from weft.server.visit import Visit, current_visit


class DoorHub:
    """Implements `weft.hub.base.Hub` over another one."""

    def __init__(
        self,
        hub: Hub,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_open: Callable[[Visit], None] | None = None,
    ) -> None:
        """`on_open` hears of every visit that got what it asked for into the hub."""
        self._hub = hub
        self._on_open = on_open
        self._clock = clock
        self._metered: dict[RequestId, _Metered] = {}

    def models(self) -> tuple[ModelCard, ...]:
        """What the key of the current request may see; all of them for the server itself."""
        visit = current_visit.get()
        cards = self._hub.models()
        if visit is None or visit.key is None:
            return cards
        return tuple(card for card in cards if visit.key.allows(card))

    def open(self, new: NewRequest) -> tuple[RequestId, AsyncIterator[Chunk]]:
        """See `weft.hub.base.Hub.open`."""
        visit = current_visit.get()
        if visit is None:
            return self._hub.open(new)
        if visit.key is not None:
            self._check(visit, visit.key, new)
            priority = new.priority if visit.key.priority is None else visit.key.priority
            # A salt of the request's own, behind the key's tenant, stays.
            own = new.tenant.partition("\0")[0] == visit.key.tenant
            tenant = new.tenant if own else visit.key.tenant
            new = msgspec.structs.replace(new, tenant=tenant, priority=priority)
        request, chunks = self._hub.open(new)
        if visit.key is not None:
            visit.key.limits.charge_tokens(len(new.prompt))
        visit.opened += 1
        if self._on_open is not None:
            self._on_open(visit)
        visit.model = new.model
        visit.prompt_tokens += len(new.prompt)
        metered = _Metered(chunks, visit, self._clock, lambda: self._metered.pop(request, None))
        self._metered[request] = metered
        return request, metered

    def _check(self, visit: Visit, key: Key, new: NewRequest) -> None:
        """Raises HubRefusal for what is beyond the key. An HTTP request is admitted as a whole: its
        first choice is checked, the others are owed."""
        card = _card(self._hub.models(), new.model)
        if card is None or not key.allows(card):
            message = f"model {new.model!r} does not exist; GET /v1/models lists those that do"
            raise HubRefusal(ReplyError(code=MODEL_NOT_FOUND, message=message))
        if visit.opened:
            return
        wait_s = key.limits.wait_for_tokens(len(new.prompt))
        if wait_s is not None:
            raise _too_much("tokens a minute", wait_s)
        weights = card.base or card.name
        if key.limits.bounds_cold_models and not _is_warm(self._hub.view(), weights):
            wait_s = key.limits.call_in(weights)
            if wait_s is not None:
                raise _too_much("models a minute that have to be brought in first", wait_s)

    def cancel(self, request: RequestId) -> None:
        metered = self._metered.pop(request, None)
        self._hub.cancel(request)
        if metered is not None:
            metered.settle()

    def view(self) -> PoolView:
        return self._hub.view()

    def health(self) -> Health:
        return self._hub.health()


class _Metered(AsyncIterator[Chunk]):
    """Passes chunks on and counts their tokens for the visit and its key."""

    def __init__(
        self,
        chunks: AsyncIterator[Chunk],
        visit: Visit,
        clock: Callable[[], float],
        forget: Callable[[], object],
    ) -> None:
        self._chunks = chunks
        self._visit = visit
        self._clock = clock
        self._forget = forget

    async def __anext__(self) -> Chunk:
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            self._forget()
            raise
        if chunk.finish is not None:
            self._forget()
        if chunk.tokens and self._visit.ttft_s is None:
            self._visit.ttft_s = self._clock() - self._visit.arrival_s
        self._visit.output_tokens += len(chunk.tokens)
        self._charge(len(chunk.tokens))
        return chunk

    def settle(self) -> None:
        """Nobody fetches the rest; what was made of it is paid for all the same."""
        if isinstance(self._chunks, Unfetched):
            self._charge(self._chunks.unfetched)

    def _charge(self, tokens: int) -> None:
        if self._visit.key is not None:
            self._visit.key.limits.charge_tokens(tokens)


def _card(cards: tuple[ModelCard, ...], name: str) -> ModelCard | None:
    return next((card for card in cards if card.name == name or name in card.aliases), None)


def _is_warm(view: PoolView, model: str) -> bool:
    """Its weights are on a device, or on their way."""
    return any(
        status.name == model and status.state in ("loading", "resident")
        for unit in view.units
        if unit.status is not None
        for status in unit.status.models
    )


def _too_much(what: str, wait_s: int) -> HubRefusal:
    message = f"this API key has used up its {what}; come back in {wait_s} s"
    return HubRefusal(ReplyError(code=RATE_LIMIT, message=message, wait_s=wait_s))

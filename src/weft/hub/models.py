"""What is served under which name.

A model has a name of its own below the hub: when its weights change, the new ones come as another
model, and requests that have begun finish on the old ones. Clients know names and aliases only.
"""

import msgspec

from weft.core.ids import ModelName
from weft.core.unit import UnitStatus
from weft.hub.base import ModelCard
from weft.transport.messages import BindModel


class Models:
    """Cards by public name, and the name each model has below."""

    def __init__(self) -> None:
        self.cards: dict[str, ModelCard] = {}
        self.binds: dict[ModelName, BindModel] = {}
        """Of everything that units may still be told of, removed models included."""
        self.ready: set[ModelName] = set()
        self._below: dict[str, ModelName] = {}
        self._aliases: dict[str, str] = {}

    def put(self, card: ModelCard, below: ModelName) -> ModelName | None:
        """Serve the model `below` under this card. Returns the one it takes the place of."""
        before = self._below.get(card.name)
        self.cards[card.name] = card
        self._below[card.name] = below
        self._read_aliases()
        return before if before != below else None

    def remove(self, name: str) -> ModelName:
        """Raises KeyError."""
        below = self._below.pop(name)
        del self.cards[name]
        self._read_aliases()
        return below

    def forget(self, below: ModelName) -> None:
        """Nobody uses it any more."""
        self.binds.pop(below, None)
        self.ready.discard(below)

    def _read_aliases(self) -> None:
        self._aliases = {alias: card.name for card in self.cards.values() for alias in card.aliases}

    def find(self, asked: str) -> str | None:
        """The name of a card, by name or alias."""
        return asked if asked in self.cards else self._aliases.get(asked)

    def below(self, asked: str) -> ModelName:
        """What a name in a request is called below; an unknown one stays as it is."""
        name = self.find(asked)
        return self._below[name] if name is not None else ModelName(asked)

    def resolve(self, asked: str) -> tuple[ModelName, ModelName | None]:
        """Model and adapter that a name in a request means, as they are called below."""
        below = self.below(asked)
        bind = self.binds.get(below)
        base = bind.model.base if bind is not None else None
        return (below, None) if base is None else (base, below)

    def above(self, below: ModelName) -> str | None:
        """The public name under which it is served now; None for what was removed."""
        return next((name for name, known in self._below.items() if known == below), None)

    def all_ready(self) -> bool:
        """Whether the images of all models that can be served are there."""
        return all(
            self._below[card.name] in self.ready
            for card in self.cards.values()
            if card.failed is None
        )

    def show(self, status: UnitStatus) -> UnitStatus:
        """The status in public names. What was removed and still runs is "name (old)"."""
        names = {below: name for name, below in self._below.items()}
        models = tuple(
            model
            if names.get(model.name) == model.name
            else msgspec.structs.replace(model, name=names.get(model.name, _old(model.name)))
            for model in status.models
        )
        return msgspec.structs.replace(status, models=models)


def numbered(name: str, number: int) -> ModelName:
    """What the number-th weights under a name are called below. No public name holds a #."""
    return ModelName(name if number == 1 else f"{name}#{number}")


def _old(below: ModelName) -> ModelName:
    return ModelName(f"{below} (old)")

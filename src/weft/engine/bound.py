"""The models an executor knows, and its hold on the arena for them: the same on every device."""

import threading

from weft.core.actions import Load
from weft.core.ids import ModelName
from weft.engine.adapters import BoundAdapter
from weft.engine.book import ActionBook
from weft.engine.model import BoundModel
from weft.memory.base import Arena, mapping_difference


class BoundModels(dict[ModelName, BoundModel]):
    """Bound models by name. Looking up one that is not bound raises ValueError."""

    def __init__(self, arena: Arena, arena_lock: threading.Lock, granule_bytes: int) -> None:
        super().__init__()
        self._arena = arena
        self._arena_lock = arena_lock
        self._granule_bytes = granule_bytes
        self.adapters: dict[ModelName, BoundAdapter] = {}
        """Bound adapters, of all models."""

    def __missing__(self, name: ModelName) -> BoundModel:
        raise ValueError(f"model {name!r} is not bound")

    def unbind(self, model: ModelName, book: ActionBook) -> None:
        """See `engine.base.Executor.unbind`."""
        if book.names_model(model):
            raise ValueError(f"{model}: an action that names it is in flight")
        with self._arena_lock:
            self._arena.release(model)
            if model in self.adapters:
                del self.adapters[model]
            else:
                del self[model]

    def to_load(self, action: Load) -> tuple[BoundModel | BoundAdapter, range]:
        """The model or adapter of a load and the virtual granules under its weights. Raises
        ValueError."""
        adapter, at = self.adapters.get(action.model), range(len(action.granules))
        model = adapter or self[action.model]
        if len(at) * self._granule_bytes < model.image.num_bytes:
            raise ValueError(f"{len(at)} granules are too few for {model.image.num_bytes} bytes")
        return model, at

    def check_integrity(self, mapped: dict[str, tuple[int, ...]]) -> None:
        """See `engine.base.Executor.check_integrity`. Only while no action is in flight."""
        with self._arena_lock:
            difference = mapping_difference(self._arena.mapped(), mapped)
        assert difference is None, difference

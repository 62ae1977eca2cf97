"""Carries an operator's commands out (`weft.server.admin.Operator`)."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from weft.config.pool_config import ModelConfig, PoolConfig, make_pool_config
from weft.core.errors import WeftError
from weft.hub.base import ModelCard
from weft.hub.hub import PoolHub
from weft.node.catalog import Catalog
from weft.server.admin import ModelCommand

POLL_S = 0.05

Reload = Callable[[], tuple[PoolConfig, Path]]
"""Reads the configuration again: it, and where its relative paths start. Raises WeftError."""


class PoolOperator:
    """For one pool. `reload` is None where there is no file to read again."""

    def __init__(
        self,
        hub: PoolHub,
        catalog: Catalog,
        base_dir: Path,
        *,
        reload: Reload | None,
        stop: Callable[[], None],
    ) -> None:
        self._hub = hub
        self._catalog = catalog
        roots = catalog.config.admin.model_roots
        self._roots = [Path(os.path.realpath(base_dir / root)) for root in roots]
        self._reload = reload
        self._stop = stop
        self._reloading = asyncio.Lock()
        """From reading to applying: what was read first may not be applied last."""

    async def load(self, command: ModelCommand) -> dict[str, Any]:
        """Bring a model's weights onto the device; a path adds the model first."""
        card = self._hub.find(command.model)
        if card is None:
            card = await self._add(command)
        begin_s = time.monotonic()
        self._hub.warm(self._servable(card).name)
        state = await self._wait(card.name, {"resident"}, command.wait_s)
        return {"model": card.name, "state": state, "seconds": time.monotonic() - begin_s}

    async def unload(self, command: ModelCommand) -> dict[str, Any]:
        """Take a model's weights off the device when it has no work. It stays servable."""
        card = self._servable(self._find(command.model))
        spec = self._hub.spec(card.name)
        if spec is not None and spec.pinned:
            raise WeftError(f"{card.name} is pinned; `weft unpin {card.name}` first")
        begin_s = time.monotonic()
        self._hub.unload(card.name)
        state = await self._wait(card.name, {"absent"}, command.wait_s)
        return {"model": card.name, "state": state, "seconds": time.monotonic() - begin_s}

    async def pin(self, command: ModelCommand, pinned: bool) -> dict[str, Any]:
        """Until it is said otherwise, or the next reload."""
        card = self._servable(self._find(command.model))
        spec = self._hub.spec(card.name)
        assert spec is not None, "a servable model has a spec"
        self._hub.change_model(card, msgspec.structs.replace(spec, pinned=pinned))
        return {"model": card.name, "pinned": pinned, "state": self._state(card.name)}

    async def reload(self) -> dict[str, Any]:
        """Raises WeftError for an invalid configuration: nothing has changed then."""
        if self._reload is None:
            raise WeftError("this server has no pool.yaml to read again; start it with one")
        async with self._reloading:
            config, base_dir = await asyncio.to_thread(self._reload)
            report = await self._catalog.apply(config, base_dir)
        return msgspec.structs.asdict(report)

    def drain(self) -> dict[str, Any]:
        """Refuse new requests, let those in hand finish within the grace, end."""
        self._stop()
        return {"draining": True, "unfinished": self._hub.view().unfinished}

    def models(self) -> dict[str, Any]:
        """What is served, with its state."""
        entries = []
        for card in self._hub.models():
            spec = self._hub.spec(card.name)
            entries.append(
                {
                    "model": card.name,
                    "aliases": list(card.aliases),
                    "path": card.path,
                    "pinned": bool(spec and spec.pinned),
                    "state": self._state(card.name),
                    "failed": card.failed,
                }
            )
        return {"models": entries}

    @property
    def can_reload(self) -> bool:
        return self._reload is not None

    @property
    def watches(self) -> bool:
        """Whether the configuration in effect wants its file watched."""
        return self._catalog.config.watch

    # -- parts ----------------------------------------------------------------------------------

    def _find(self, asked: str) -> ModelCard:
        card = self._hub.find(asked)
        if card is None:
            raise WeftError(f"there is no model {asked[:200]!r}; `weft ps` shows those there are")
        return card

    def _servable(self, card: ModelCard) -> ModelCard:
        if card.failed is not None:
            raise WeftError(f"{card.name} cannot be served: {card.failed}")
        return card

    async def _add(self, command: ModelCommand) -> ModelCard:
        """A checkpoint under one of the declared roots becomes a model."""
        asked = command.model
        if "\0" in asked:
            raise WeftError("no path has a zero character")
        if "/" not in asked and not any((root / asked).is_dir() for root in self._roots):
            return self._find(asked)
        path = self._under_roots(asked)
        model = ModelConfig(name=command.name or path.name, path=str(path))
        if self._hub.find(model.name) is not None:
            raise WeftError(f"the name {model.name!r} is taken; give another with --name")
        raw = msgspec.to_builtins(PoolConfig(models=[*self._catalog.config.models, model]))
        make_pool_config({"models": raw["models"]}, source="load")
        await self._catalog.add(model)
        return self._find(model.name)

    def _under_roots(self, asked: str) -> Path:
        """The folder that is meant, every link followed. Raises WeftError."""
        if not self._roots:
            raise WeftError(
                f"there is no model {asked[:200]!r}, and no admin.model_roots to load paths from"
            )
        candidates = [Path(asked)] if os.path.isabs(asked) else [r / asked for r in self._roots]
        for candidate in candidates:
            path = Path(os.path.realpath(candidate))
            if path.is_dir() and any(path.is_relative_to(root) for root in self._roots):
                return path
        raise WeftError(f"{asked[:200]!r} is no folder under admin.model_roots")

    def _state(self, name: str) -> str:
        """The furthest state that the model has on any unit."""
        order = ("resident", "loading", "dropping", "failed", "absent")
        states = {
            model.state
            for unit in self._hub.view().units
            for model in (unit.status.models if unit.status else ())
            if model.name == name
        }
        return next((state for state in order if state in states), "absent")

    def _reported_ns(self, name: str) -> float:
        """The oldest report among units that know the model; none does: it is nowhere, for sure."""
        times = [
            unit.status.at_ns
            for unit in self._hub.view().units
            if unit.status and any(model.name == name for model in unit.status.models)
        ]
        return min(times, default=float("inf"))

    async def _wait(self, name: str, ends: set[str], wait_s: float) -> str:
        """Until its state is one of these, by a report that is younger than the command. Raises
        WeftError when it fails on the way."""
        begin_ns = time.monotonic_ns()
        deadline_s = time.monotonic() + wait_s
        while True:
            card = self._hub.find(name)
            if card is None or card.failed is not None:
                raise WeftError(f"{name}: {card.failed if card else 'was removed'}")
            state = self._state(name)
            if state == "failed":
                raise WeftError(f"{name} cannot be loaded; `weft ps` says why")
            done = state in ends and self._reported_ns(name) >= begin_ns
            if done or time.monotonic() >= deadline_s:
                return state
            await asyncio.sleep(POLL_S)

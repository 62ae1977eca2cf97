"""What a reload did, and what it could not do."""

from collections.abc import Iterator
from typing import Any

import msgspec

from weft.config.pool_config import PoolConfig

LIVE = frozenset({"models", "slo", "defaults", "keep_alive_s", "watch"})
"""Keys of the configuration that take effect while it runs."""
LIVE_PARTS = frozenset({"server.keys"})
"""The same inside of others."""


class ReloadReport(msgspec.Struct, kw_only=True):
    """Names of models, and keys."""

    added: list[str] = []
    changed: list[str] = []
    """New weights: they take over when their image is there."""
    updated: list[str] = []
    """Other wishes for the same weights, in effect now."""
    removed: list[str] = []
    failed: dict[str, str] = {}
    """Why these could not be added or changed; what was served before stays."""
    needs_restart: list[str] = []
    """Keys whose new value is not in effect."""

    def line(self) -> str:
        """For the log: key=value, empty ones left out."""
        plain = msgspec.structs.asdict(self)
        parts = [f"{key}={','.join(value)}" for key, value in plain.items() if value]
        return " ".join(parts) or "nothing changed"


def needs_restart(started: PoolConfig, new: PoolConfig) -> list[str]:
    """Keys that are different from those the server was started with and cannot change live."""
    before, after = dict(_leaves(started)), dict(_leaves(new))
    return sorted(key for key in after if before.get(key) != after[key] and key not in LIVE_PARTS)


def _leaves(config: PoolConfig) -> Iterator[tuple[str, Any]]:
    for key, value in msgspec.to_builtins(config).items():
        if key in LIVE:
            continue
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in value.items())
        else:
            yield key, value

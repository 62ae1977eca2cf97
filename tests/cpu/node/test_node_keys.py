"""A reload exchanges the API keys, or leaves them as they are."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from weft.config.pool_config import ModelConfig, PoolConfig, ServerConfig
from weft.config.server_config import KeyConfig
from weft.core.errors import WeftError
from weft.node.app import with_keys
from weft.node.changes import needs_restart
from weft.server.keys import KeyRing, hash_of

OLD, NEW = "o" * 32, "n" * 32


def config(*keys: str) -> PoolConfig:
    entries = tuple(KeyConfig(name=f"k{i}", sha256=hash_of(key)) for i, key in enumerate(keys))
    return PoolConfig(
        models=[ModelConfig(name="m", path="m")], server=ServerConfig(host="0.0.0.0", keys=entries)
    )


def test_keys_are_exchanged() -> None:
    state = SimpleNamespace(keys=KeyRing.load(config(OLD).server.keys, Path()))
    given = [config(NEW)]
    reload = with_keys(lambda: (given[0], Path()), state, "0.0.0.0", insecure=False)
    assert reload() == (given[0], Path())
    assert state.keys.find(OLD.encode()) is None and state.keys.find(NEW.encode()) is not None
    assert needs_restart(config(OLD), config(NEW)) == []


def test_the_last_key_stays_where_strangers_reach_the_port() -> None:
    state = SimpleNamespace(keys=KeyRing.load(config(OLD).server.keys, Path()))
    reload = with_keys(lambda: (config(), Path()), state, "0.0.0.0", insecure=False)
    with pytest.raises(WeftError, match="no API keys"):
        reload()
    assert state.keys.find(OLD.encode()) is not None
    with_keys(lambda: (config(), Path()), state, "0.0.0.0", insecure=True)()
    assert len(state.keys) == 0

"""API keys: who is asking. Only hashes are known here, and comparing takes the same time for all.

A key is 256 random bits, so its plain SHA-256 is as good as a slow hash is for a password: nobody
can try them out.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from weft.config.server_config import KeyConfig, check_hash
from weft.core.errors import WeftError
from weft.hub.base import ModelCard
from weft.server.limits import KeyLimits

KEY_PREFIX = "sk-weft-"
MAX_KEY_BYTES = 512
MAX_HASH_FILE_BYTES = 4096


def new_key() -> str:
    """A fresh key: 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """What stands in pool.yaml for it."""
    return hashlib.sha256(key.encode()).hexdigest()


class Key:
    """One key of the configuration, with what it has used."""

    def __init__(self, config: KeyConfig, digest: bytes, limits: KeyLimits) -> None:
        self.config = config
        self.name = config.name
        self.digest = digest
        self.limits = limits
        self.tenant = config.tenant if config.tenant is not None else config.name
        self.priority = config.priority
        self.operator = config.operator

    def allows(self, card: ModelCard) -> bool:
        """May it see and use this model? By its name or any of its aliases."""
        return any(
            fnmatchcase(name, glob)
            for name in (card.name, *card.aliases)
            for glob in self.config.models
        )


class KeyRing:
    """The keys of a server. Without any, everybody who reaches the port may ask."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self._keys = tuple(keys)

    @classmethod
    def load(
        cls,
        configs: Sequence[KeyConfig],
        base_dir: Path,
        *,
        before: "KeyRing | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> "KeyRing":
        """Reads the hash files. A key that is unchanged from `before` keeps what it has used.
        Raises WeftError."""
        used: Mapping[str, Key] = {key.name: key for key in before._keys} if before else {}
        keys: dict[bytes, Key] = {}
        for config in configs:
            digest = bytes.fromhex(config.sha256 or _read_hash(base_dir / str(config.file)))
            if digest in keys:
                raise WeftError(
                    f"the API keys {config.name!r} and {keys[digest].name!r} have the same hash"
                )
            old = used.get(config.name)
            limits = old.limits if old is not None and old.config == config else None
            keys[digest] = Key(config, digest, limits or _limits(config, clock))
        return cls(tuple(keys.values()))

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, given: bytes) -> Key | None:
        """The key with this value. All are compared, whichever it is."""
        digest = hashlib.sha256(given).digest()
        found: Key | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def _limits(config: KeyConfig, clock: Callable[[], float]) -> KeyLimits:
    return KeyLimits(
        requests_per_minute=config.requests_per_minute,
        tokens_per_minute=config.tokens_per_minute,
        cold_models_per_minute=config.cold_models_per_minute,
        clock=clock,
    )


def _read_hash(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_HASH_FILE_BYTES:
            raise WeftError(f"{file}: too large for the hash of a key")
        text = file.read_text(encoding="ascii")
    except OSError as error:
        raise WeftError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise WeftError(f"{file}: not a hash; `weft key new` prints one") from None
    words = text.split()
    digest = words[0].removeprefix("sha256:") if words else ""
    check_hash(digest, str(file))
    return digest

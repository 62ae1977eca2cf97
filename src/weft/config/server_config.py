"""The HTTP server's part of pool.yaml: its address, its limits, and who may ask for what."""

import re
from collections.abc import Iterator, Sequence

import msgspec

from weft.core.errors import WeftError

MAX_KEYS = 4096
MAX_GLOBS = 1024
_KEY_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
_TENANT = re.compile(r"^[A-Za-z0-9._@-]{1,64}$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_HOST = re.compile(r"^(\*\.)?[A-Za-z0-9_.:-]{1,255}$")
_ORIGIN = re.compile(r"^https?://[A-Za-z0-9_.:\[\]-]{1,255}$")


class KeyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One API key. The key itself is never written down, only its SHA-256; `weft key new` makes
    both."""

    name: str
    """What the access log calls it; letters, digits and . _ @ -, unique."""
    sha256: str | None = None
    """64 hexadecimal digits, the hash of the key."""
    file: str | None = None
    """Or a file with those digits; relative paths start at the configuration file."""
    models: tuple[str, ...] = ("*",)
    """Names or patterns (`*`, `?`, `[ab]`) of the models it may see and use."""
    requests_per_minute: int | None = None
    """Default: no bound. A bucket of one minute's worth, filled evenly."""
    tokens_per_minute: int | None = None
    """Prompt tokens when a request is admitted, tokens of answers as they are made."""
    cold_models_per_minute: int | None = None
    """Distinct models that are on no device, which it may call in within a minute."""
    priority: int | None = None
    """Of all its requests, whatever they say."""
    tenant: str | None = None
    """Whose prefix cache it shares. Default: the key's name, so nobody else's."""
    operator: bool = False
    """It may read /metrics and /weft/status, which show every model's name and load."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    """The address to serve on."""
    port: int = 8321
    """The port to serve on; 0 takes a free one."""
    hold_s: float = 120.0
    """How long a request may wait to begin before it gets 503."""
    max_queue: int = 1024
    """Unfinished requests in the pool before new ones get 429."""
    max_model_queue: int | None = None
    """Unfinished requests of one model before its new ones get 429. Default: three quarters of
    `max_queue` where there are several models."""
    max_body_bytes: int = 8 << 20
    """A request's body may not be larger."""
    keepalive_s: float = 10.0
    """A silent stream gets an SSE comment this often."""
    max_connections: int = 4096
    """Open connections before new ones get 503 and are closed."""
    slow_reader_s: float = 60.0
    """A client that takes nothing of what waits for it for so long is cut off."""
    drain_s: float = 10.0
    """How long answers in flight may go on after SIGTERM."""
    allowed_hosts: tuple[str, ...] = ()
    """Names, beside localhost, under which browsers and proxies reach this server; `*.example.org`
    for all below one. Checked when this is set, and on loopback without keys."""
    cors_origins: tuple[str, ...] = ()
    """Origins such as https://chat.example.org whose pages may call this server from a browser."""
    access_log: bool = False
    """One line a request: id, key's name, model, status, tokens, times; never content."""
    keys: tuple[KeyConfig, ...] = ()
    """API keys. With any, every path but /health and /ready needs one."""


def check_server(server: ServerConfig, source: str) -> None:
    """Raises WeftError with the path of the first thing wrong."""
    for path, value, low, high in _bounds(server):
        if value is not None and not low <= value <= high:
            raise WeftError(f"{source}: `$.{path}` is {value}; it must lie in {low} .. {high}")
    for i, host in enumerate(server.allowed_hosts):
        if not _HOST.fullmatch(host):
            raise WeftError(f"{source}: `$.server.allowed_hosts[{i}]` is not a host name: {host!r}")
    for i, origin in enumerate(server.cors_origins):
        if not _ORIGIN.fullmatch(origin):
            raise WeftError(
                f"{source}: `$.server.cors_origins[{i}]` is {origin!r}; write an origin such as "
                "https://chat.example.org (there is no `*`)"
            )
    _check_keys(server.keys, source)


def _check_keys(keys: Sequence[KeyConfig], source: str) -> None:
    if len(keys) > MAX_KEYS:
        raise WeftError(f"{source}: `$.server.keys` has more than {MAX_KEYS} entries")
    names: set[str] = set()
    hashes: set[str] = set()
    for i, key in enumerate(keys):
        where = f"{source}: `$.server.keys[{i}]`"
        if not _KEY_NAME.fullmatch(key.name):
            raise WeftError(f"{where}.name {key.name[:80]!r}: letters, digits and . _ @ - only")
        if key.name in names:
            raise WeftError(f"{where}.name {key.name!r} is used twice")
        names.add(key.name)
        if (key.sha256 is None) == (key.file is None):
            raise WeftError(f"{where} needs either sha256 or file; `weft key new` makes a key")
        if key.sha256 is not None:
            check_hash(key.sha256, where)
            if key.sha256 in hashes:
                raise WeftError(f"{where}.sha256 is that of another key too")
            hashes.add(key.sha256)
        if not 1 <= len(key.models) <= MAX_GLOBS or any(len(glob) > 256 for glob in key.models):
            raise WeftError(f"{where}.models needs 1 to {MAX_GLOBS} names or patterns")
        if key.tenant is not None and not _TENANT.fullmatch(key.tenant):
            raise WeftError(f"{where}.tenant {key.tenant[:80]!r}: letters, digits and . _ @ - only")


def check_hash(text: str, where: str) -> None:
    """Raises WeftError unless `text` is a SHA-256 in hexadecimal digits."""
    if not _SHA256.fullmatch(text):
        raise WeftError(
            f"{where}: not a SHA-256 in 64 lower-case hexadecimal digits; `weft key new` and "
            "`weft key hash` print one (never write the key itself here)"
        )


def _bounds(server: ServerConfig) -> Iterator[tuple[str, float | None, float, float]]:
    yield from (
        ("server.port", server.port, 0, 65535),
        ("server.hold_s", server.hold_s, 0.1, 86400),
        ("server.max_queue", server.max_queue, 1, 1_000_000),
        ("server.max_model_queue", server.max_model_queue, 1, 1_000_000),
        ("server.max_body_bytes", server.max_body_bytes, 1024, 1 << 30),
        ("server.keepalive_s", server.keepalive_s, 0.1, 3600),
        ("server.max_connections", server.max_connections, 1, 1_000_000),
        ("server.slow_reader_s", server.slow_reader_s, 0.1, 3600),
        ("server.drain_s", server.drain_s, 0, 3600),
        ("server.allowed_hosts", len(server.allowed_hosts), 0, 1024),
        ("server.cors_origins", len(server.cors_origins), 0, 1024),
    )
    for i, key in enumerate(server.keys):
        path = f"server.keys[{i}]"
        yield f"{path}.requests_per_minute", key.requests_per_minute, 1, 1e9
        yield f"{path}.tokens_per_minute", key.tokens_per_minute, 1, 1e12
        yield f"{path}.cold_models_per_minute", key.cold_models_per_minute, 0, 1e6
        yield f"{path}.priority", key.priority, -1000, 1000

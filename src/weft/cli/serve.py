"""`weft serve`: paths and options become a PoolConfig, and the pool runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer

from weft import logs
from weft.config.pool_config import (
    MAX_CONFIG_BYTES,
    PoolConfig,
    make_pool_config,
    parse_pool_config,
)
from weft.core.errors import WeftError

YAML = (".yaml", ".yml")
LOG_LEVELS = ("debug", "info", "warning", "error")


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the command line; None leaves the configuration's own value."""

    host: str | None = None
    port: int | None = None
    device: str | None = None
    device_memory: str | None = None
    host_memory: str | None = None
    policy: str | None = None
    dtype: str | None = None


def run(
    paths: Sequence[Path],
    overrides: Overrides,
    *,
    insecure: bool,
    log_level: str,
    log_format: str = "text",
    trace_dir: Path | None,
) -> None:
    """Serves until interrupted. Raises WeftError."""
    if log_level.lower() not in LOG_LEVELS:
        raise WeftError(f"--log-level {log_level!r}: use one of {', '.join(LOG_LEVELS)}")
    if log_format not in logs.FORMATS:
        raise WeftError(f"--log-format {log_format!r}: use one of {', '.join(logs.FORMATS)}")
    config, base_dir = build_config(paths, overrides)
    from weft.server.binding import check_bind

    check_bind(config.server.host, insecure=insecure, has_keys=bool(config.server.keys))
    logs.configure(log_level, log_format)
    from weft.node.app import run_pool

    file = paths[0] if paths[0].suffix in YAML else None

    run_pool(
        config,
        base_dir,
        insecure=insecure,
        trace_dir=trace_dir,
        on_ready=lambda url: typer.echo(ready_text(config, url)),
        reload=(lambda: build_config(paths, overrides)) if file is not None else None,
        config_file=file,
    )


def ready_text(config: PoolConfig, url: str) -> str:
    """Where it is served, and a first request that works as printed."""
    name = config.models[0].name
    count = len(config.models)
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    key = ' -H "Authorization: Bearer $WEFT_API_KEY"' if config.server.keys else ""
    return (
        f"weft: {count} model{'s' if count > 1 else ''} at {url}/v1\n"
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    )


def build_config(paths: Sequence[Path], overrides: Overrides) -> tuple[PoolConfig, Path]:
    """The configuration and the folder where its relative paths start. Raises WeftError."""
    files = [path for path in paths if path.suffix in YAML]
    if files and len(paths) > 1:
        raise WeftError(f"{files[0]} is a pool of its own; give it alone, or model folders only")
    if files:
        config = parse_pool_config(read_config_text(files[0]), source=str(files[0]))
        base_dir = files[0].resolve().parent
        source = str(files[0])
    else:
        config = _from_folders(paths)
        base_dir = Path.cwd()
        source = "command line"
    merged = _merge(msgspec.to_builtins(config), overrides)
    return make_pool_config(merged, source=source), base_dir


def read_config_text(file: Path) -> str:
    """Raises WeftError."""
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise WeftError(f"{file}: larger than {MAX_CONFIG_BYTES} bytes; is it a pool.yaml?")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise WeftError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise WeftError(f"{file}: not UTF-8; is it a pool.yaml?") from None


def _from_folders(paths: Sequence[Path]) -> PoolConfig:
    models = []
    seen: dict[str, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise WeftError(
                f"{path}: neither a model folder nor a .yaml file; a model folder holds config.json"
            )
        folder = path.resolve()
        if folder.name in seen:
            raise WeftError(
                f"{path} and {seen[folder.name]} have the same name; name them in a pool.yaml"
            )
        seen[folder.name] = path
        models.append({"name": folder.name, "path": str(folder)})
    return make_pool_config({"models": models}, source="command line")


def _merge(raw: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    sections = {
        ("server", "host"): overrides.host,
        ("server", "port"): overrides.port,
        ("engine", "device"): overrides.device,
        ("engine", "device_memory"): overrides.device_memory,
        ("engine", "host_memory"): overrides.host_memory,
    }
    for (section, key), value in sections.items():
        if value is not None:
            raw[section][key] = value
    if overrides.policy is not None:
        raw["policy"] = overrides.policy
    if overrides.dtype is not None:
        for model in raw["models"]:
            model["dtype"] = overrides.dtype
    return raw

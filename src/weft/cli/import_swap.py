"""`weft import llama-swap`: a llama-swap config.yaml becomes a pool.yaml.

Nothing in the file is executed or expanded beyond its own macros. What has no counterpart is said.
Source: the configuration page of llama-swap's documentation.
"""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import yaml

from weft.config.pool_config import MAX_CONFIG_BYTES, make_pool_config
from weft.config.values import check_values
from weft.core.errors import WeftError

_PATH_FLAGS = ("--model", "-m", "--model-path")
_CONTEXT_FLAGS = ("--ctx-size", "-c", "--max-model-len", "--context-length")
_DROPPED = {
    "env": "weft starts no process for a model",
    "cmdStop": "weft starts no process for a model",
    "proxy": "weft serves the model itself",
    "checkEndpoint": "weft knows when a model is ready",
    "filters": "use `defaults` for sampling parameters",
    "concurrencyLimit": "use server.max_model_queue",
    "unlisted": "every model is listed",
    "metadata": "",
}
_TOP_DROPPED = {
    "healthCheckTimeout": "weft knows when a model is ready",
    "logLevel": "has no counterpart",
    "startPort": "weft starts no process for a model",
    "sendLoadingState": "a stream that waits gets comments",
    "apiKeys": "use server.keys, which holds hashes: `weft key hash` prints that of a key",
    "matrix": "weft decides by room who runs beside whom",
}


def convert(text: str, source: str) -> tuple[dict[str, Any], list[str]]:
    """(plain values of a pool.yaml, what could not be carried over). Raises WeftError."""
    raw = _read(text, source)
    notes: list[str] = []
    macros = _macros(raw.get("macros"))
    pinned = _persistent(raw)
    preloaded = _preloaded(raw)
    models: list[dict[str, Any]] = []
    for name, given in raw["models"].items():
        name = str(name)
        entry = given if isinstance(given, dict) else {}
        model = _model(name, entry, {**macros, "MODEL_ID": name}, notes)
        if model is None:
            continue
        if name in pinned:
            model["pinned"] = True
        if name in preloaded:
            model["preload"] = True
        if "ttl" not in entry and isinstance(raw.get("globalTTL"), int) and raw["globalTTL"] > 0:
            model["keep_alive_s"] = raw["globalTTL"]
        models.append(model)
    notes += [f"{key}: {why}" for key, why in _TOP_DROPPED.items() if key in raw]
    if isinstance(raw.get("groups"), dict):
        notes.append("groups: weft decides by room who runs beside whom; only persistent is kept")
    if not models:
        raise WeftError(f"{source}: none of its models has a checkpoint that weft could serve")
    config = {"models": models}
    make_pool_config(config, source=source)
    return config, notes


def render(config: dict[str, Any], notes: list[str], source: str) -> str:
    """pool.yaml with what to look at as comments."""
    head = [f"# Converted from {source}. Check the paths: weft reads Hugging Face folders.", "#"]
    # On one line, whatever the file has for names: nothing may leave its comment.
    head += [f"# not carried over: {' '.join(note.split())}" for note in notes]
    body = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join([*head, "", body])


def _read(text: str, source: str) -> dict[str, Any]:
    if len(text) > MAX_CONFIG_BYTES:
        raise WeftError(f"{source}: larger than {MAX_CONFIG_BYTES} bytes")
    try:
        raw: Any = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise WeftError(f"{source}: not YAML: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("models"), dict):
        raise WeftError(f"{source}: no `models:` with an entry a model; is it llama-swap's?")
    check_values(raw, source)
    return raw


def _macros(raw: Any) -> dict[str, str]:
    """llama-swap allows a mapping, or a list of one-entry mappings."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(raw, dict):
        pairs = list(raw.items())
    elif isinstance(raw, list):
        pairs = [pair for item in raw if isinstance(item, dict) for pair in item.items()]
    return {str(key): str(value) for key, value in pairs}


def _expand(text: str, macros: dict[str, str]) -> str:
    """${name}, a few levels deep. Bounded: a macro may name another, not grow without end."""
    for _ in range(8):
        new = re.sub(r"\$\{([A-Za-z0-9_.-]+)\}", lambda m: macros.get(m[1], m[0]), text)
        if new == text or len(new) > 1 << 16:
            break
        text = new
    return text


def _model(
    name: str, entry: dict[str, Any], macros: dict[str, str], notes: list[str]
) -> dict[str, Any] | None:
    words = list(
        _words(_expand(str(entry.get("cmd", "")), {**macros, **_macros(entry.get("macros"))}))
    )
    path = _flag(words, _PATH_FLAGS) or _served_by_vllm(words)
    if path is None:
        notes.append(f"{name}: its cmd names no checkpoint (--model, -m)")
        return None
    if path.endswith(".gguf"):
        notes.append(
            f"{name}: {path} is GGUF; point `path` at the Hugging Face folder of the model"
        )
    model: dict[str, Any] = {"name": name, "path": path}
    aliases = entry.get("aliases")
    if isinstance(aliases, list) and aliases:
        model["aliases"] = [str(alias) for alias in aliases]
    ttl = entry.get("ttl")
    if isinstance(ttl, int | float) and ttl > 0:
        model["keep_alive_s"] = ttl
    context = _flag(words, _CONTEXT_FLAGS)
    if context is not None and context.isdigit() and int(context) > 1:
        model["max_context_tokens"] = int(context)
    used = entry.get("useModelName")
    if isinstance(used, str) and used and used != name and used not in model.get("aliases", ()):
        model.setdefault("aliases", []).append(used)
    for key, why in _DROPPED.items():
        if entry.get(key):
            notes.append(f"{name}: {key}" + (f" ({why})" if why else ""))
    return model


def _words(command: str) -> Iterator[str]:
    """The command's words as a shell would split them; comments and line ends are nothing."""
    lexer = shlex.shlex(command.replace("\\\n", " "), posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    try:
        yield from lexer
    except ValueError:
        yield from command.split()  # an open quote: good enough to find a path


def _flag(words: list[str], flags: tuple[str, ...]) -> str | None:
    for i, word in enumerate(words):
        key, equals, value = word.partition("=")
        if key in flags:
            if equals:
                return value
            if i + 1 < len(words):
                return words[i + 1]
    return None


def _served_by_vllm(words: list[str]) -> str | None:
    """`vllm serve PATH ...`"""
    for i, word in enumerate(words[:-2]):
        if word.endswith("vllm") and words[i + 1] == "serve":
            return words[i + 2]
    return None


def _persistent(raw: dict[str, Any]) -> set[str]:
    groups = raw.get("groups")
    found: set[str] = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and group.get("persistent") is True:
            members = group.get("members")
            found |= {str(name) for name in members} if isinstance(members, list) else set()
    return found


def _preloaded(raw: dict[str, Any]) -> set[str]:
    """hooks.on_startup.preload"""
    hooks: Any = raw.get("hooks")
    for key in ("on_startup", "preload"):
        hooks = hooks.get(key) if isinstance(hooks, dict) else None
    return {str(name) for name in hooks} if isinstance(hooks, list) else set()

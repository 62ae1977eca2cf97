"""JSON Schema of pool.yaml, with what the docstrings of the structs say as descriptions."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import msgspec

from weft.config.pool_config import PoolConfig
from weft.config.values import DURATION_PATTERN


def json_schema() -> dict[str, Any]:
    """JSON Schema of pool.yaml, for editors. Keys that end in `_s` take seconds or a text such as
    10m."""
    structs = {struct.__name__: struct for struct in _structs(PoolConfig)}
    schema: dict[str, Any] = msgspec.json.schema(PoolConfig)
    for name, definition in schema["$defs"].items():
        texts = key_texts(structs[name])
        for key, value in definition["properties"].items():
            value["description"] = texts[key]
            if key.endswith("_s"):
                kinds = value.pop("anyOf", [{"type": value.pop("type", "number")}])
                value["anyOf"] = [*kinds, {"type": "string", "pattern": DURATION_PATTERN}]
    return schema


@functools.cache
def key_texts(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The docstring under each field of a struct. Every key of the configuration has one."""
    body = ast.parse(textwrap.dedent(inspect.getsource(struct))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    field: str | None = None
    for node in body.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)):
                field = name
            case ast.Expr(value=ast.Constant(value=str(text))) if field is not None:
                texts[field] = " ".join(text.split())
                field = None
            case _:
                field = None
    return texts


def keys() -> Iterator[str]:
    """Every key by its path, such as `models[].name` and `engine.depth`."""
    yield from _keys(PoolConfig, "")


def _keys(struct: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    for field in msgspec.structs.fields(struct):
        inner = next(_struct_types(field.type), None)
        is_list = "list" in str(field.type) or "tuple[weft" in str(field.type)
        path = f"{prefix}{field.name}"
        yield path
        if inner is not None:
            yield from _keys(inner, f"{path}[]." if is_list else f"{path}.")


def _structs(struct: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    """The struct and those inside it."""
    yield struct
    for field in msgspec.structs.fields(struct):
        for inner in _struct_types(field.type):
            yield from _structs(inner)


def _struct_types(kind: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for argument in getattr(kind, "__args__", ()):
        yield from _struct_types(argument)

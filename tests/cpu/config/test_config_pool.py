"""pool.yaml: what may stand there, how it is refused, and that all of it is documented."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from weft.config.pool_config import PoolConfig, make_pool_config, parse_pool_config
from weft.config.schema import json_schema, keys
from weft.config.values import parse_duration, with_durations
from weft.core.errors import WeftError

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "pool.yaml"


def make(models: list[dict[str, Any]] | None = None, **more: Any) -> PoolConfig:
    entries = models or [{"name": "a", "path": "a"}]
    return make_pool_config({"models": entries, **more}, source="test")


def paths_of(value: Any, prefix: str = "") -> set[str]:
    found: set[str] = set()
    if isinstance(value, list):
        for item in value:
            found |= paths_of(item, f"{prefix.removesuffix('.')}[].")
    elif isinstance(value, dict):
        for key, inner in value.items():
            found |= {f"{prefix}{key}"} | paths_of(inner, f"{prefix}{key}.")
    return found


def test_the_example_parses_and_shows_every_key() -> None:
    text = EXAMPLE.read_text()
    config = parse_pool_config(text)
    assert config.models[0].ttft_slo_s == 2.0 and config.models[1].keep_alive_s == 600.0
    assert set(keys()) <= paths_of(yaml.safe_load(text)), "a key is missing in the example"


def test_every_key_has_a_description_in_the_schema_and_a_line_in_the_documentation() -> None:
    schema = json_schema()
    for name, definition in schema["$defs"].items():
        for key, value in definition["properties"].items():
            assert len(value["description"]) > 10, f"{name}.{key}"
    page = (ROOT / "docs" / "configuration.md").read_text()
    for path in keys():
        assert f"`{path}`" in page, f"{path} is not in docs/configuration.md"


def test_the_schema_takes_durations_as_numbers_and_texts() -> None:
    hold = json_schema()["$defs"]["ServerConfig"]["properties"]["hold_s"]
    assert [kind["type"] for kind in hold["anyOf"]] == ["number", "string"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10m", 600), ("90s", 90), ("1h30m", 5400), ("250ms", 0.25), (" 2D ", 172800), ("0.5h", 1800)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)
    assert make(server={"hold_s": "1.5m"}).server.hold_s == 90.0


@given(st.text(max_size=20))
def test_a_text_is_a_duration_or_refused_by_name(text: str) -> None:
    try:
        assert parse_duration(text) >= 0
    except WeftError as error:
        assert "such as 10m" in str(error)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"server": {"hold_s": "soon"}}, r"\$\.server\.hold_s.*not a duration"),
        ({"keep_alive_s": -2}, "must lie in -1"),
        ({"admin": {"port": 1}}, "needs `admin.key_sha256`"),
        ({"admin": {"key_sha256": "secret"}}, "64 hexadecimal"),
        ({"engine": {"spare_host_memory": "much"}}, "not a size"),
        ({"defaults": {"temperature": 3}}, "must lie in 0 .. 2"),
        ({"defaults": {"temprature": 1}}, "temprature"),
    ],
)
def test_what_is_wrong_is_refused_by_its_path(more: dict[str, Any], message: str) -> None:
    with pytest.raises(WeftError, match=message):
        make(**more)


@pytest.mark.parametrize(
    "models",
    [
        [{"name": "a", "path": "a"}, {"name": "a", "path": "b"}],
        [{"name": "a", "path": "a", "aliases": ["b"]}, {"name": "b", "path": "b"}],
        [{"name": "a", "path": "a", "aliases": ["x", "x"]}],
        [{"name": "a", "path": "a", "aliases": ["a"]}],
        [{"name": "a", "path": "a", "aliases": ["no space"]}],
        [{"name": "a", "path": "a", "adapters": [{"name": "a", "path": "x"}]}],
        [{"name": "a", "path": "a", "adapters": [{"name": "x", "path": "x"}] * 2}],
        [
            {"name": "a", "path": "a", "adapters": [{"name": "b", "path": "x"}]},
            {"name": "b", "path": "b"},
        ],
        [{"name": "a", "path": "a", "aliases": [f"x{i}" for i in range(65)]}],
    ],
)
def test_names_and_aliases_are_unique_and_well_formed(models: list[dict[str, Any]]) -> None:
    with pytest.raises(WeftError, match=r"aliases|used twice"):
        make(models)


def test_deep_nesting_is_refused() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(WeftError, match="too deeply"):
        with_durations(deep)


def test_aliases_that_multiply_without_end_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    with pytest.raises(WeftError, match="aliases"):
        parse_pool_config("\n".join([*lines, "models: *a11"]))
    with pytest.raises(WeftError, match="aliases"):
        parse_pool_config("models: &a [*a]")


def test_no_path_has_a_zero_character() -> None:
    with pytest.raises(WeftError, match="zero character"):
        parse_pool_config('models: [{name: a, path: "x\\0y"}]')


def test_a_configuration_survives_its_own_form() -> None:
    config = parse_pool_config(EXAMPLE.read_text())
    assert make_pool_config(msgspec.to_builtins(config), source="again") == config

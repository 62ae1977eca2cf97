"""docs/http.md names the fields, codes and limits that the code has."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from weft.core.errors import HTTP_STATUS
from weft.server import body, fields
from weft.server.body import IGNORED, UNSUPPORTED
from weft.server.openapi import REQUESTS
from weft.server.schemas import StreamOptions

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")


def names_after(start: str) -> set[str]:
    line = next(line for line in TEXT.splitlines() if line.startswith(start))
    return set(re.findall(r"`([a-z_]+)`", line))


@pytest.mark.parametrize("schema", [*REQUESTS, StreamOptions])
def test_every_served_field_is_named(schema: type[BaseModel]) -> None:
    named = set(re.findall(r"`([a-z_]+)(?:: [a-z0-9]+)?`", TEXT))
    assert set(schema.model_fields) - named == set()


def test_every_ignored_field_is_named() -> None:
    assert names_after("Accepted and without effect:") == IGNORED


def test_every_refused_example_is_refused() -> None:
    assert names_after("Refused with a 400") <= set(UNSUPPORTED)


def test_every_error_code_is_named() -> None:
    table = set(re.findall(r"`([a-z_]+)`", TEXT[TEXT.index("| status | code") :]))
    sources = "\n".join(
        file.read_text(encoding="utf-8") for file in (ROOT / "src/weft/server").glob("*.py")
    )
    used = set(re.findall(r'code="([a-z_]+)"', sources)) | set(HTTP_STATUS)
    codes = {"not_found", "method_not_allowed"} | used
    assert codes - table - {"invalid_request"} == set()


def test_the_limits_are_the_documented_ones() -> None:
    assert f"up to {fields.MAX_STOPS}" in TEXT
    assert f"up to {fields.MAX_PROMPTS} of either" in TEXT
    assert f"within {body.BODY_LIMIT_S:.0f} s" in TEXT

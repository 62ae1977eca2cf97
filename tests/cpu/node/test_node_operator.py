"""An operator's commands that need no worker."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from weft.config.pool_config import PoolConfig
from weft.core.errors import WeftError
from weft.hub.hub import PoolHub
from weft.node.catalog import Catalog
from weft.node.changes import ReloadReport
from weft.node.operator import PoolOperator
from weft.server.admin import ModelCommand


class Told:
    """In the place of hub and catalog: writes down what is done, and knows no model."""

    config = PoolConfig(models=[])

    def __init__(self) -> None:
        self.log: list[str] = []

    def read(self) -> tuple[PoolConfig, Path]:
        self.log.append("read")
        return self.config, Path()

    async def apply(self, config: PoolConfig, base_dir: Path) -> ReloadReport:
        for _ in range(20):  # time enough for another thread to read
            await asyncio.to_thread(lambda: None)
        self.log.append("apply")
        return ReloadReport()

    def find(self, asked: str) -> Any:
        return None


def operator(told: Told) -> PoolOperator:
    return PoolOperator(
        cast(PoolHub, told),
        cast(Catalog, told),
        Path(),
        reload=told.read,
        stop=lambda: None,
    )


def test_what_was_read_first_is_not_applied_last() -> None:
    async def scenario() -> list[str]:
        told = Told()
        own = operator(told)
        await asyncio.gather(own.reload(), own.reload())
        return told.log

    assert asyncio.run(scenario()) == ["read", "apply"] * 2


@pytest.mark.parametrize("asked", ["nobody", "a/b", "a\0/b", "/etc"])
def test_what_is_no_model_is_an_error_of_the_operator(asked: str) -> None:
    with pytest.raises(WeftError):
        asyncio.run(operator(Told()).load(ModelCommand(model=asked)))

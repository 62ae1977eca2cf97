"""Hostile model folders end in a WeftError or are computed, in bounded memory and time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])


def serve_hostile(folder: Path, first: int, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "support.hostile_main", str(folder / "m"), str(first), str(count)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    found = re.search(r"refused (\d+) of", done.stdout)
    assert found is not None
    assert 0.5 * count < int(found[1]) < count, "damage that is hardly ever noticed, or always"


def test_fifty_hostile_folders(tmp_path: Path) -> None:
    serve_hostile(tmp_path, 0, 50)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_a_thousand_hostile_folders(tmp_path: Path, part: int) -> None:
    serve_hostile(tmp_path, 1000 + 200 * part, 200)

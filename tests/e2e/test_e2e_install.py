"""`pip install .` gives a working `weft`: the wheel has all of it; nothing reaches back here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_wheel_serves_from_any_folder(tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--target", str(site), str(ROOT)], check=True, capture_output=True
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = site / "bin" / "weft"
    assert command.exists()

    def weft(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, str(command), *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    where = "import weft; print(weft.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], cwd=tmp_path, env=environment)
    assert found.decode().startswith(str(site))
    assert "serve" in weft("--help")
    assert "can be served" in weft("check", str(ROOT / "demo" / "speaker"))
    assert '"models"' in weft("config-schema")

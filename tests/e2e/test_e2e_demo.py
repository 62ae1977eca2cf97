"""The demo as a machine without a terminal runs it: a table, a result, exit code 0."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from weft.replay.records import Result

ROOT = Path(__file__).resolve().parents[2]
SPEAKER = ROOT / "demo" / "speaker"


def run_demo(work: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "demo" / "run.py"), "--work", str(work), *options],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        timeout=600,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_whole_demo_switches_often_and_loses_no_request(tmp_path: Path) -> None:
    done = run_demo(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = msgspec.json.decode((tmp_path / "result.json").read_bytes(), type=Result)
    assert result.total.requests == 336
    assert result.total.failures == 0
    assert (result.total.switches_in or 0) >= 50
    assert all(row.requests > 0 for row in result.models)
    assert all(row.model in done.stdout for row in result.models)
    assert (tmp_path / "switch.svg").exists()
    assert (SPEAKER / "model.safetensors").stat().st_size <= 8 << 20


def test_a_missing_speaker_is_said_in_a_line(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "--speaker", str(tmp_path / "nobody"), "--device", "cpu")
    assert done.returncode == 1
    assert "make it with demo/train_speaker.py" in done.stdout

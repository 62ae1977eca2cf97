"""The Triton kernels on the CPU, through Triton's interpreter, against their torch twins.

Triton decides at import whether it interprets, so each file runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "name", ["attention", "elementwise", "backend", "sampling", "lora", "lora_steps", "quant"]
)
def test_interpreted(name: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            str(HERE / f"interpreted_{name}.py"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

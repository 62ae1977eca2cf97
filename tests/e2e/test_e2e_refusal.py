"""What cannot work on this machine ends `weft serve` with one line, before anybody waits."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.tiny import tiny_checkpoint


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_ends_the_server(tmp_path: Path) -> None:
    """Not a server that says it serves while its worker is started again and again."""
    tiny_checkpoint(tmp_path / "m")
    command = [sys.executable, "-c", "from weft.cli.main import main; raise SystemExit(main())"]
    options = ["--device", "cuda", "--port", "0", "--host-memory", "64M"]
    done = subprocess.run(
        [*command, "serve", str(tmp_path / "m"), *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "no CUDA device can be used" in done.stderr.splitlines()[-1]
    assert done.stderr.count(" state=starting pid=") == 1


def test_an_unknown_model_folder_ends_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from weft.cli.main import main; raise SystemExit(main())"]
    done = subprocess.run(
        [*command, "serve", str(tmp_path / "nowhere"), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "nowhere" in done.stderr.splitlines()[-1]


def test_a_port_in_use_ends_the_server_before_a_worker_starts(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "m")
    command = [sys.executable, "-c", "from weft.cli.main import main; raise SystemExit(main())"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*command, "serve", str(tmp_path / "m"), "--port", port, "--host-memory", "64M"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert "choose another with --port" in done.stderr.splitlines()[-1]
    assert " state=starting pid=" not in done.stderr

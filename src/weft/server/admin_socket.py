"""Where the admin plane's Unix socket lies. Imports nothing heavy: the command line looks it up.

Default: $XDG_RUNTIME_DIR/weft/, else weft-<uid>/ in the folder of temporary files, a folder of this
user that nobody else may enter, and in it one socket a server, named by the public port.
"""

import os
import socket
import stat
import tempfile
from pathlib import Path

from weft.core.errors import WeftError

MAX_SOCKET_PATH = 100
"""Bytes; the kernel takes 107."""
MAX_FOLDER = 64


def runtime_dir() -> Path:
    """The default folder, whether it exists or not."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and len(base) <= MAX_FOLDER and os.path.isdir(base) and os.access(base, os.W_OK):
        return Path(base) / "weft"
    temp = Path(tempfile.gettempdir())
    if len(os.fsencode(temp)) > MAX_FOLDER:
        temp = Path("/tmp")
    return temp / f"weft-{os.getuid()}"


def default_socket(port: int) -> Path:
    """Of the server on this public port."""
    return runtime_dir() / f"admin-{port}.sock"


def make_private(folder: Path) -> None:
    """Make the folder, or see that it is ours and closed to others. Raises WeftError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(folder)
    except OSError as error:
        raise WeftError(f"{folder}: {error.strerror}; set admin.socket to another place") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise WeftError(f"{folder} is not a folder of this user; set admin.socket")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise WeftError(f"{folder} is open to other users; `chmod 700` it, or set admin.socket")


def bind_socket(path: Path) -> socket.socket:
    """A listening socket that only this user (and root) may connect to. A dead server's socket in
    its place is replaced. Raises WeftError."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise WeftError(f"{path} is longer than {MAX_SOCKET_PATH} bytes; set admin.socket")
    if path.parent == runtime_dir():
        make_private(path.parent)
    if _answers(path):
        raise WeftError(f"another server has {path}; stop it, or set admin.socket")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        if path.is_socket():
            path.unlink()
        sock.bind(str(path))
        sock.listen(16)
    except OSError as error:
        sock.close()
        raise WeftError(f"{path}: {error.strerror}; set admin.socket to another place") from None
    finally:
        os.umask(before)
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True

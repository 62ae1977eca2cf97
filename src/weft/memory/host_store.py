"""The node's host store: one sparse memfd that holds weight images and parked KV.

The node agent creates it and owns it; workers inherit the descriptor and attach. It outlives
every worker, so what was parked survives a worker's death. No torch here.
"""

import ctypes
import mmap
import os

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class HostStore:
    """A shared mapping of the memfd. All offsets are bytes from its beginning."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self.fd = fd
        self.num_bytes = num_bytes
        self._map = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    @classmethod
    def create(cls, num_bytes: int) -> "HostStore":
        """A new store, all holes: takes no memory until written. Node agent only."""
        fd = os.memfd_create("weft-host-store", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        return cls(fd, num_bytes)

    @classmethod
    def attach(cls, fd: int, num_bytes: int) -> "HostStore":
        """An inherited descriptor. Raises ValueError if the memfd is smaller than said."""
        if os.fstat(fd).st_size < num_bytes:
            raise ValueError("host store is smaller than announced")
        return cls(fd, num_bytes)

    @property
    def buffer(self) -> mmap.mmap:
        """The whole mapping; use with torch.frombuffer / numpy.frombuffer(offset=, count=)."""
        return self._map

    def view(self, offset: int, num_bytes: int) -> memoryview:
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.num_bytes:
            raise ValueError(f"range {offset}+{num_bytes} is outside the host store")
        return memoryview(self._map)[offset : offset + num_bytes]

    def punch(self, offset: int, num_bytes: int) -> None:
        """Give a range's memory back; it reads as zeros afterwards."""
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        if num_bytes and _libc.fallocate(self.fd, mode, offset, num_bytes) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def resident_bytes(self) -> int:
        """Memory the store holds now."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Unmap and close. Views and tensors over the mapping must be gone (else BufferError)."""
        self._map.close()
        os.close(self.fd)

"""Promise 1 in tests: what was evicted or parked comes back bit for bit.

Checksums live in the executor's memory, not in the host store: KV parked by an earlier
incarnation is not checked. Slow (every byte is read again on the host); off in production.
"""

import threading
import zlib
from collections.abc import Sequence

import torch

from weft.core.request import Extent

MAX_REQUESTS = 1 << 16

Place = tuple[Extent, ...]
"""Where one page lies in the host store."""


class ChecksumError(RuntimeError):
    """Bytes came back different. Never retryable: the host store or a copy is broken."""


def checksum(*parts: torch.Tensor) -> int:
    """CRC-32 of uint8 tensors, concatenated; on any device (copies to the host)."""
    value = 0
    for part in parts:
        value = zlib.crc32(part.cpu().contiguous().numpy().data, value)
    return value


class Checksums:
    """What was seen at park and at the first load. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parked: dict[int, dict[Place, int]] = {}
        self._images: dict[tuple[str, int], int] = {}
        self.compared = 0
        """Pages and image extents compared so far, so that a test sees that it tested."""

    def parked(self, request: int, places: Sequence[Place], sums: Sequence[int]) -> None:
        """Remember the pages of a request just written to `places`; forgets what they overwrote."""
        with self._lock:
            known = self._parked.pop(request, {})
            known = {
                place: value
                for place, value in known.items()
                if not any(_overlap(place, fresh) for fresh in places)
            }
            known.update(zip(places, sums, strict=True))
            self._parked[request] = known
            while len(self._parked) > MAX_REQUESTS:
                del self._parked[next(iter(self._parked))]

    def check_resumed(self, request: int, places: Sequence[Place], sums: Sequence[int]) -> None:
        """Compare pages just read from `places`; unknown ones pass. Raises ChecksumError."""
        with self._lock:
            known = self._parked.get(request, {})
            for i, (place, value) in enumerate(zip(places, sums, strict=True)):
                if place in known:
                    self.compared += 1
                    if known[place] != value:
                        raise ChecksumError(f"request {request}: KV page {i} differs after resume")

    def check_image(self, key: str, extent: int, on_device: int, on_host: int) -> None:
        """Compare an extent just loaded with its host bytes and with its first load.

        Raises ChecksumError.
        """
        with self._lock:
            self.compared += 1
            first = self._images.setdefault((key, extent), on_host)
        if on_device != first or on_host != first:
            raise ChecksumError(f"image {key}: extent {extent} differs from its first load")


def _overlap(one: Place, other: Place) -> bool:
    return any(
        a.offset < b.offset + b.num_bytes and b.offset < a.offset + a.num_bytes
        for a in one
        for b in other
    )

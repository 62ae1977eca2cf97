"""Byte ranges of a region of the host store: first fit, coalescing, cut at chunk borders."""

import bisect

from weft.core.request import Extent

ALIGN_BYTES = 4096


class ExtentAllocator:
    """Free ranges as a sorted list; a request may get several extents where no single one fits."""

    def __init__(self, offset: int, num_bytes: int, chunk_bytes: int) -> None:
        # Whole aligned pieces only: a shorter last one could be taken as padding and never given.
        begin = -(-offset // ALIGN_BYTES) * ALIGN_BYTES
        num_bytes = max((offset + num_bytes) // ALIGN_BYTES * ALIGN_BYTES - begin, 0)
        self._begin, self._end = begin, begin + num_bytes
        self._chunk = chunk_bytes
        self._free: list[tuple[int, int]] = [(begin, self._end)] if num_bytes else []
        self._taken: dict[int, int] = {}
        self.free_bytes = num_bytes
        self.num_bytes = num_bytes

    def take(self, num_bytes: int) -> tuple[Extent, ...] | None:
        """Extents of together `num_bytes` (in order), or None if there is no room for all."""
        size = -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
        if num_bytes <= 0 or size > self.free_bytes:
            return None
        pieces: list[tuple[int, int]] = []
        left = size
        whole = next((i for i, (b, e) in enumerate(self._free) if e - b >= size), None)
        index = whole if whole is not None else 0
        while left:
            begin, end = self._free[index]
            stop = min(end, begin + left)
            pieces.append((begin, stop))
            left -= stop - begin
            if stop == end:
                del self._free[index]
            else:
                self._free[index] = (stop, end)
        self.free_bytes -= size
        return self._record(pieces, num_bytes)

    def _record(self, pieces: list[tuple[int, int]], num_bytes: int) -> tuple[Extent, ...]:
        extents: list[Extent] = []
        left = num_bytes
        for begin, end in pieces:
            self._taken[begin] = end
            while begin < end and left:
                border = (begin // self._chunk + 1) * self._chunk
                length = min(end - begin, border - begin, left)
                extents.append(Extent(begin, length))
                begin += length
                left -= length
        return tuple(extents)

    def reserve(self, extents: tuple[Extent, ...]) -> bool:
        """Take exactly these (KV parked by an earlier incarnation). False, with no effect, if
        they are not free, not in the region or not aligned."""
        wanted = merge(extents)
        for begin, end in wanted:
            if begin < self._begin or end > self._end or begin % ALIGN_BYTES:
                return False
            stop = min(-(-end // ALIGN_BYTES) * ALIGN_BYTES, self._end)
            i = bisect.bisect_right(self._free, (begin, self._end)) - 1
            if i < 0 or self._free[i][0] > begin or self._free[i][1] < stop:
                return False
        # Begins are aligned, so rounding an end up cannot reach into the next wanted range.
        for begin, end in wanted:
            stop = min(-(-end // ALIGN_BYTES) * ALIGN_BYTES, self._end)
            i = bisect.bisect_right(self._free, (begin, self._end)) - 1
            b, e = self._free.pop(i)
            if stop < e:
                self._free.insert(i, (stop, e))
            if b < begin:
                self._free.insert(i, (b, begin))
            self._taken[begin] = stop
            self.free_bytes -= stop - begin
        return True

    def free(self) -> tuple[Extent, ...]:
        """What is not taken."""
        return tuple(Extent(begin, end - begin) for begin, end in self._free)

    def give(self, extents: tuple[Extent, ...]) -> None:
        """Return what `take` or `reserve` gave, whole. Raises KeyError if it was not taken."""
        for begin, _ in merge(extents):
            self._give_range(begin)

    def _give_range(self, begin: int) -> None:
        end = self._taken.pop(begin)
        self.free_bytes += end - begin
        i = bisect.bisect_left(self._free, (begin, end))
        if i < len(self._free) and self._free[i][0] == end:
            end = self._free.pop(i)[1]
        if i > 0 and self._free[i - 1][1] == begin:
            i -= 1
            begin = self._free.pop(i)[0]
        self._free.insert(i, (begin, end))

    def check_integrity(self) -> None:
        ranges = sorted([(b, e, "free") for b, e in self._free])
        ranges += [(b, e, "taken") for b, e in self._taken.items()]
        ranges.sort()
        at = self._begin
        for begin, end, kind in ranges:
            assert begin == at and end > begin, f"{kind} range {begin}-{end} after {at}"
            at = end
        assert at == self._end or not ranges, f"region ends at {at}, not {self._end}"
        assert self.free_bytes == sum(e - b for b, e in self._free)


def merge(extents: tuple[Extent, ...]) -> list[tuple[int, int]]:
    """Adjacent extents joined, in order of offset: [(begin, end)]."""
    out: list[tuple[int, int]] = []
    for extent in sorted(extents):
        begin, end = extent.offset, extent.offset + extent.num_bytes
        if out and out[-1][1] == begin:
            out[-1] = (out[-1][0], end)
        else:
            out.append((begin, end))
    return out

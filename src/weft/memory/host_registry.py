"""Registers the host store with the device, chunk by chunk, in the background.

Registering pins memory and faults it in (0.05 to 0.4 s a GiB), so it happens on a thread of its
own, what is wanted first first. A copy waits for the chunks it touches. No torch: the calls that
register are given.

A registered chunk must not be hole-punched: the device would go on reading and writing the pages
it pinned while the host sees new, empty ones.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable


class RegistrationFailed(RuntimeError):
    """A chunk could not be registered; copies that touch it fail."""


class HostRegistry:
    """Chunk i is bytes i * chunk_bytes .. of the store (the last may be shorter)."""

    def __init__(
        self,
        num_bytes: int,
        chunk_bytes: int,
        register: Callable[[int, int], None],
        unregister: Callable[[int], None],
        prepare_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """register(offset, num_bytes) and unregister(offset) may raise; both are called by one
        thread at a time."""
        self._num_bytes = num_bytes
        self._chunk_bytes = chunk_bytes
        self._register = register
        self._unregister = unregister
        self._prepare_thread = prepare_thread
        self._changed = threading.Condition()
        self._wanted: OrderedDict[int, None] = OrderedDict()
        self._done: dict[int, BaseException | None] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="weft-register", daemon=True)
        self._thread.start()

    def want(self, offset: int, num_bytes: int, *, first: bool = False) -> None:
        """Register these bytes some time; `first`: before everything wanted so far."""
        with self._changed:
            self._want(self._chunks(offset, num_bytes), first)

    def wait(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Block until all ranges (offset, num_bytes) are registered, putting them first.

        What failed before is tried again: memory may have been short then. Raises
        RegistrationFailed, also when the registry closes.
        """
        with self._changed:
            chunks = {c for offset, size in ranges for c in self._chunks(offset, size)}
            for chunk in chunks:
                if self._done.get(chunk) is not None:
                    del self._done[chunk]  # wanted again below: whoever else waits sees it done
            if chunks - self._done.keys():
                self._want(sorted(chunks), first=True)
                self._changed.wait_for(lambda: chunks <= self._done.keys() or self._closing)
            for chunk in chunks:
                if chunk not in self._done:
                    raise RegistrationFailed("the executor closes")
                if (error := self._done[chunk]) is not None:
                    raise RegistrationFailed(f"host chunk {chunk} is not registered: {error}")

    def registered_bytes(self) -> int:
        with self._changed:
            good = [chunk for chunk, error in self._done.items() if error is None]
            return sum(self._size(chunk) for chunk in good)

    def stop(self) -> None:
        """Register nothing more; who waits for what is not registered gets RegistrationFailed."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def close(self) -> None:
        """Stop, and unregister everything. No copy may be in flight. Idempotent.

        Raises the first failure to unregister, after having tried all.
        """
        self.stop()
        failures: list[Exception] = []
        for chunk, error in list(self._done.items()):
            if error is None:
                try:
                    self._unregister(chunk * self._chunk_bytes)
                except Exception as failure:
                    failures.append(failure)
        self._done.clear()
        if failures:
            raise failures[0]

    def _want(self, chunks: Iterable[int], first: bool) -> None:
        fresh = [chunk for chunk in chunks if chunk not in self._done]
        for chunk in reversed(fresh) if first else fresh:
            self._wanted.setdefault(chunk)
            if first:
                self._wanted.move_to_end(chunk, last=False)
        self._changed.notify_all()

    def _chunks(self, offset: int, num_bytes: int) -> list[int]:
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self._num_bytes:
            raise ValueError(f"range {offset}+{num_bytes} is outside the host store")
        if num_bytes == 0:
            return []
        last = (offset + num_bytes - 1) // self._chunk_bytes
        return list(range(offset // self._chunk_bytes, last + 1))

    def _size(self, chunk: int) -> int:
        return min(self._chunk_bytes, self._num_bytes - chunk * self._chunk_bytes)

    def _work(self) -> None:
        unfit: Exception | None = None
        try:
            self._prepare_thread()
        except Exception as failure:  # nobody may wait for ever for a thread that is gone
            unfit = failure
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closing)
                if self._closing:
                    return
                chunk = next(iter(self._wanted))
            error: BaseException | None = None
            try:
                if unfit is not None:
                    raise unfit
                self._register(chunk * self._chunk_bytes, self._size(chunk))
            except Exception as failure:
                error = failure
            with self._changed:
                self._wanted.pop(chunk, None)
                self._done[chunk] = error
                self._changed.notify_all()

"""The host store is registered chunk by chunk, what is wanted first first, and given back."""

import threading

import pytest

from weft.memory.host_registry import HostRegistry, RegistrationFailed


class Calls:
    """Records registrations; holds them until `opened` is set; fails those in `bad`."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.opened, self.inside = threading.Event(), threading.Event()
        self.bad = bad
        self.done: list[tuple[int, int]] = []
        self.undone: list[int] = []

    def register(self, offset: int, num_bytes: int) -> None:
        self.inside.set()
        assert self.opened.wait(60)
        if offset in self.bad:
            raise OSError("no more")
        self.done.append((offset, num_bytes))

    def unregister(self, offset: int) -> None:
        self.undone.append(offset)


def test_order_and_sizes() -> None:
    calls = Calls()
    registry = HostRegistry(1050, 100, calls.register, calls.unregister)
    registry.want(0, 500)
    assert calls.inside.wait(60), "chunk 0 is being registered"
    registry.want(900, 150, first=True)
    registry.want(650, 100)
    calls.opened.set()
    registry.wait([(650, 100), (0, 500), (900, 150)])
    # 0 had begun; then what was wanted first, and what the wait above named, in some order.
    assert calls.done[0] == (0, 100) and (1000, 50) in calls.done
    assert sorted(calls.done) == [
        *((i * 100, 100) for i in (0, 1, 2, 3, 4, 6, 7, 9)),
        (1000, 50),
    ]
    assert registry.registered_bytes() == 850
    registry.close()
    registry.close()
    assert sorted(calls.undone) == sorted(offset for offset, _ in calls.done)


def test_first_goes_before_the_rest() -> None:
    calls = Calls()
    registry = HostRegistry(1000, 100, calls.register, calls.unregister)
    registry.want(0, 1000)
    assert calls.inside.wait(60)
    registry.want(700, 200, first=True)
    calls.opened.set()
    registry.wait([(700, 200)])
    assert [offset for offset, _ in calls.done[:3]] == [0, 700, 800]
    registry.close()


def test_a_chunk_that_fails_fails_its_copies_only() -> None:
    calls = Calls(bad=(200,))
    calls.opened.set()
    registry = HostRegistry(1000, 100, calls.register, calls.unregister)
    with pytest.raises(RegistrationFailed, match="chunk 2"):
        registry.wait([(150, 100)])
    registry.wait([(0, 200), (300, 1)])
    with pytest.raises(ValueError, match="outside"):
        registry.wait([(950, 51)])
    registry.close()
    assert 200 not in calls.undone


def test_closing_releases_who_waits() -> None:
    calls = Calls()
    registry = HostRegistry(1000, 100, calls.register, calls.unregister)
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            registry.wait([(500, 10), (600, 10)])
        except RegistrationFailed as error:
            failures.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert calls.inside.wait(60)
    closer = threading.Thread(target=registry.close)
    closer.start()
    waiter.join(60)
    calls.opened.set()
    closer.join(60)
    assert len(failures) == 1 and not waiter.is_alive() and not closer.is_alive()


def test_what_failed_is_tried_again_by_who_needs_it() -> None:
    calls = Calls(bad=(200,))
    calls.opened.set()
    registry = HostRegistry(1000, 100, calls.register, calls.unregister)
    with pytest.raises(RegistrationFailed, match="chunk 2"):
        registry.wait([(200, 100)])
    calls.bad = ()
    registry.wait([(150, 100)])
    assert (200, 100) in calls.done and registry.registered_bytes() == 200
    registry.close()
    assert calls.undone.count(200) == 1


def test_a_thread_that_cannot_use_the_device_keeps_nobody_waiting() -> None:
    def prepare() -> None:
        raise RuntimeError("the device is lost")

    calls = Calls()
    registry = HostRegistry(1000, 100, calls.register, calls.unregister, prepare)
    with pytest.raises(RegistrationFailed, match="lost"):
        registry.wait([(0, 1)])
    registry.close()

"""Progress of a replay: a bar at a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from weft.replay import driver

PLAIN_EVERY_S = 5.0


def _words(progress: driver.Progress, rate: float) -> str:
    waiting = progress.sent - progress.done
    return (
        f"{progress.done}/{progress.total} done, {waiting} open, {progress.failed} failed, "
        f"{rate:,.0f} tokens/s"
    )


@contextmanager
def watching(console: Console) -> Iterator[Callable[[driver.Progress], None]]:
    """Yields the function to give to `replay_requests`."""
    if console.is_terminal:
        columns = (TextColumn("replay"), BarColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=1)

            def draw(progress: driver.Progress) -> None:
                rate = progress.tokens / max(progress.elapsed_s, 1e-9)
                bar.update(
                    task,
                    total=max(progress.total, 1),
                    completed=progress.done,
                    description=_words(progress, rate),
                )

            yield draw
    else:
        next_s = PLAIN_EVERY_S
        last = (0.0, 0)

        def print_line(progress: driver.Progress) -> None:
            nonlocal next_s, last
            finished = progress.done == progress.total
            if progress.elapsed_s < next_s and not finished:
                return
            since_s, before = last
            rate = (progress.tokens - before) / max(progress.elapsed_s - since_s, 1e-9)
            last = (progress.elapsed_s, progress.tokens)
            next_s = progress.elapsed_s + PLAIN_EVERY_S
            console.print(f"{progress.elapsed_s:6.1f} s  {_words(progress, rate)}")

        yield print_line

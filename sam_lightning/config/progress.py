"""How far long work is: a bar on a terminal, and elsewhere a line in the log now and then."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

FIRST, MOST = 5, 60  # seconds until the first line, and at most between two


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """What to call after each of ``total`` parts of the work ``name``; it may end earlier."""
    if sys.stderr.isatty():
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(name, total=total)
            yield lambda: bar.advance(task)
        return
    started = time.monotonic()
    done, wait, next_line = 0, FIRST, started + FIRST

    def advance() -> None:
        nonlocal done, wait, next_line
        done += 1
        if (now := time.monotonic()) < next_line or done >= total:
            return
        wait = min(2 * wait, MOST)
        next_line = now + wait
        left = duration((now - started) / done * (total - done))
        log.info("%s: %s of %s, about %s left", name, f"{done:,}", f"{total:,}", left)

    yield advance


def duration(seconds: float) -> str:
    """A rough time in the unit that people would take: 45 s, 3 min, 2.5 h, 4 days."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if (count := seconds / size) >= 1.5:
            return f"{count:.1f} {unit}" if count < 10 and size > 60 else f"{count:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"

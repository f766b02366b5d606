"""Ctrl-C while Python imports, which ends the process at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def let_end() -> None:
    """Let Ctrl-C end this process without a word, which its parent has said; it started deaf."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


@contextmanager
def importing(discard: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let Ctrl-C in the block end the process at once: one line, exit code 130.

    A KeyboardInterrupt during imports prints a long traceback. If a library's C code swallows it,
    the import fails later with an error that does not mention Ctrl-C.

    Args:
        discard: called before the process ends.
    """

    def leave(signum: int, frame: object) -> None:
        discard()
        os.write(2, b"error: stopped by SIGINT\n")
        os._exit(128 + signum)

    if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []):
        let_end()
        yield
        return
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # another program's process, or one that ignores it
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

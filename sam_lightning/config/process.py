"""How a process ends: at once by Ctrl-C while it imports, and not because a pipe is closed."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WINDOWS = "on Windows only the optimizer and the models work; use Linux, macOS or WSL"
SPINS = "10000"  # read by libgomp when it is loaded, 300000 by default


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
    if sys.platform == "win32":  # it has no POSIX locks, and other signals
        print(f"error: {WINDOWS}", file=sys.stderr)
        sys.exit(2)

    if "OMP_WAIT_POLICY" not in os.environ:
        # torch's threads wait for each other by turning for several ms. Where another program
        # takes a core, they take each other's time; after a tenth of a ms they now sleep instead.
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

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


class _Output(io.FileIO):
    """A file descriptor that becomes the null device once its pipe is closed."""

    def write(self, data: "bytes | memoryview") -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except BrokenPipeError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return memoryview(data).nbytes


def outlive_pipes() -> None:
    """Let this process go on to its own end when ``| head`` has ended.

    A closed pipe would raise in whatever prints next, and so a run would fail that did nothing
    wrong. The same holds for a letter that a terminal does not have, which is written as ``\\u``
    and its number. What a test or a notebook has put in the place of stdout stays.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        raw: io.FileIO | io.BufferedWriter = _Output(stream.fileno(), "w", closefd=False)
        if not isinstance(stream.buffer, io.RawIOBase):  # it is one with python -u
            raw = io.BufferedWriter(raw)
        raises = stream.errors in ("strict", "surrogateescape")  # the second without a locale
        errors = "backslashreplace" if raises else stream.errors
        options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, errors, **options))  # type: ignore[arg-type]

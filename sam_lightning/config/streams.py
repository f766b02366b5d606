"""What a process prints when nobody reads it any more."""

import io
import os
import sys


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
        errors = "backslashreplace" if stream.errors == "strict" else stream.errors
        options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, errors, **options))  # type: ignore[arg-type]

"""Fifteen minutes of one GPU: python -m benchmarks.gpu [PART ...] [--images FOLDER] [--json FILE].

Each part is a process of its own with its own time limit, the most valuable first. What a part
finds is in FILE at once, and beside it, as FILE.md, in the tables of docs/speed.md: a stop at any
time leaves whole results, and what was not reached is said. --device cpu tries it all in small.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_tables import markdown

ROOT = Path(__file__).parent.parent
GRACE = 10  # seconds from SIGTERM to SIGKILL
Row = dict[str, Any]


class Part(NamedTuple):
    """A module of benchmarks that measures it, and the most seconds it may take on a GPU."""

    module: str
    seconds: float
    about: str


PARTS = {
    "correct": Part("gpu_fits", 90, "graphs give the weights of eager passes, and their memory"),
    "tests": Part("gpu_runs", 150, "the tests that need a GPU"),
    "speed": Part("gpu_fits", 190, "images a second after a warm-up: ours, with graphs, peers"),
    "compiled": Part("gpu_fits", 160, "the same, compiled"),
    "kernels": Part("gpu_fits", 40, "the kernels of an update and their time, by name"),
    "train": Part("gpu_runs", 900, "SAM against SGD on photographs of CIFAR-10, by train.py"),
}


class Report:
    """What is known so far, as a JSON file that is always whole, and as Markdown beside it."""

    def __init__(self, file: Path, content: dict[str, Any]) -> None:
        self.file = file
        self.content = content

    def write(self) -> None:
        """Replace both files."""
        texts = {"": json.dumps(self.content, indent=1) + "\n", ".md": markdown(self.content)}
        for ending, text in texts.items():
            path = self.file.with_name(self.file.name + ending)
            new = path.with_name(f".{path.name}")
            new.write_text(text)
            os.replace(new, path)


def run_part(
    command: Sequence[str], rows: Path, limit: float, take: Callable[[Row], None]
) -> tuple[str, float]:
    """Run a command and pass on the rows of JSON that it appends to a file.

    Args:
        command: its output goes to a log beside ``rows``.
        rows: the file.
        limit: seconds; then the command, and what it started, are told to end and killed.
        take: is given each row, as soon as it is there.

    Returns:
        how it ended, and its seconds.
    """
    started = time.monotonic()
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("")
    log, new = rows.with_suffix(".log"), _appended(rows)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                time.sleep(0.1)
                for row in next(new):
                    take(row)
            in_time = process.poll() is not None
        finally:
            _end(process)
    for row in next(new):
        take(row)
    seconds = round(time.monotonic() - started, 1)
    if not in_time:
        return f"killed at its limit of {limit:.0f} s", seconds
    if process.returncode:
        last = (log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
        return f"failed with exit code {process.returncode}: {last[:300]}", seconds
    return "completed", seconds


def _appended(file: Path) -> Iterator[list[Row]]:
    """What whole lines a file has got since the time before."""
    read = 0
    while True:
        lines = file.read_bytes()[read:].splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        read += sum(map(len, whole))
        yield [json.loads(line) for line in whole]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group, at the latest after ``GRACE`` seconds."""
    with suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen parts, all of them by default, within the time."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="What one GPU does in fifteen minutes. Parts, in this order:\n"
        + "\n".join(f"  {name:9} {part.about}" for name, part in PARTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="all of them by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=15, help="for all parts together")
    parser.add_argument("--limit", type=float, help="seconds of a part; default: its own limit")
    parser.add_argument(
        "--images", type=Path, help="CIFAR-10 as train/<class>/* and test/<class>/*"
    )
    parser.add_argument("--json", type=Path, default=Path("logs/benchmarks/gpu.json"))
    options = parser.parse_args(argv)
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"{name}: no such part; there are {', '.join(PARTS)}")
    if options.images is not None and not (options.images / "train").is_dir():
        parser.error(f"--images {options.images}: there is no folder train in it")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: there is no CUDA GPU here; --device cpu tries it in small")

    ends = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    chosen = [name for name in PARTS if name in (options.parts or PARTS)]
    states: dict[str, dict[str, Any]] = {name: {"state": "not reached"} for name in chosen}
    rows: list[Row] = []
    content = {"device": options.device, "environment": {}, "parts": states, "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report, folder = Report(options.json, content), options.json.with_suffix("").absolute()
    try:
        for name in chosen:
            left = ends - time.monotonic()
            report.write()
            if left < 1:
                continue
            limit = min(options.limit or PARTS[name].seconds, left)

            def take(row: Row, name: str = name) -> None:
                if "environment" in row:
                    content["environment"] = row["environment"]
                else:
                    rows.append({"part": name, **row})
                    print(json.dumps(rows[-1]), flush=True)
                report.write()

            arguments = {
                **{"--device": options.device, "--rows": folder / f"{name}.jsonl"},
                **{"--seconds": limit, "--images": options.images and options.images.absolute()},
            }
            command = [sys.executable, "-m", f"benchmarks.{PARTS[name].module}", name]
            command += [str(a) for pair in arguments.items() if pair[1] is not None for a in pair]
            states[name]["state"] = "stopped"  # if this process is
            states[name]["state"], states[name]["seconds"] = run_part(
                command, folder / f"{name}.jsonl", limit, take
            )
    finally:
        report.write()
        print(markdown(content), flush=True)
        print(f"written to {options.json} and {options.json}.md", file=sys.stderr)


if __name__ == "__main__":
    main()

"""The processes of a study: side by side, each able to fail or to go on alone."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from sam_lightning.config.errors import ConfigError, Interrupted
from sam_lightning.config.hydra_errors import CONF
from sam_lightning.config.schema import one_line
from sam_lightning.studies.plan import Planned

TRAIN = CONF.parent / "train.py"
OUTPUT = "output.txt"  # what a run prints; locked while it runs
PROMPT = "$ python train.py "  # in front of each start there
ERROR = "error: "
POLL = 0.2  # seconds


@dataclass(frozen=True)
class Outcome:
    """What a run's folder says of it.

    ``state`` is ``completed``, ``failed``, ``interrupted`` (it was told to stop), ``started`` (it
    runs, or was killed) or ``missing``.
    """

    state: str
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def completed(self) -> bool:
        """Whether there is a result."""
        return self.state == "completed"


def outcome(run: Planned) -> Outcome:
    """Read a run's folder."""
    try:
        summary: Any = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
        state = summary.get("status")
        metrics = {k: v for k, v in summary.get("metrics", {}).items() if v is not None}
    except (OSError, ValueError, AttributeError):  # there is none, or none that counts
        summary, state, metrics = {}, None, {}
    if state == "completed":
        return Outcome(state, "", metrics)
    lines = _printed(run)
    if errors := [line for line in lines if line.startswith(ERROR)]:
        return Outcome("failed", errors[-1].removeprefix(ERROR))
    if state is not None:
        return Outcome(str(state), str(summary.get("exit_reason")))
    started = (run.folder / ".hydra" / "overrides.yaml").is_file()
    return Outcome("started" if started else "missing")


def begun(run: Planned) -> bool:
    """Whether there is anything to go on from; not so where a run was refused."""
    checkpoints = (run.folder / "checkpoints").glob("*.ckpt")
    return (run.folder / "metrics.json").exists() or any(checkpoints)


def _printed(run: Planned) -> list[str]:
    """What a run has printed since it was started last."""
    try:
        output = (run.folder / OUTPUT).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return output.rpartition(PROMPT)[2].strip().splitlines()[1:]


@dataclass
class Job:
    """A process that is at a run."""

    run: Planned
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """How long it has been at it."""
        return time.monotonic() - self.started


@dataclass
class Runner:
    """Runs what is not completed, so many processes at a time; leaving the block ends them."""

    runs: Sequence[Planned]
    processes: int
    jobs: list[Job] = field(default_factory=list)
    pending: list[Planned] = field(default_factory=list)
    waiting: set[Path] = field(default_factory=set)
    worked: float = 0.0  # seconds of what has been completed here
    passes: float = 0.0  # the cost of that
    stopped: int | None = None  # by this signal

    def __enter__(self) -> "Runner":
        self._before = {}
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:  # which nohup asks for
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.jobs:
            job.process.terminate()
        for job in self.jobs:
            job.process.wait()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.stopped is not None:  # asked twice
            for job in self.jobs:
                if job.process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(job.process.pid, signal.SIGKILL)
        self.stopped = signum

    def run(self) -> None:
        """Run to the end, whatever fails.

        Raises:
            Interrupted: a signal came; on leaving the block the runs save and end.
            ConfigError: a run's folder cannot be written.
        """
        self.pending = [run for run in self.runs if not outcome(run).completed]
        done = len(self.runs) - len(self.pending)
        print(f"{len(self.runs)} runs: {done} completed before, {len(self.pending)} to go")
        while self.pending or self.jobs:
            if self.stopped is not None:
                print(f"stopped by {signal.Signals(self.stopped).name}; the runs save and end")
                raise Interrupted(self.stopped)
            try:
                self._start()
                time.sleep(POLL)
                self._collect()
            except OSError as error:
                raise ConfigError(f"{error.filename or 'the runs'}: {one_line(error)}") from error

    def _start(self) -> None:
        for run in list(self.pending):
            if len(self.jobs) == self.processes:
                return
            run.folder.mkdir(parents=True, exist_ok=True)
            with open(run.folder / OUTPUT, "ab", buffering=0) as output:
                if not _locked(output):
                    if run.folder not in self.waiting:
                        print(f"{run.folder.name}: another process is at it; waiting for that")
                    self.waiting.add(run.folder)
                    continue
                self.pending.remove(run)
                if outcome(run).completed:
                    self._say(run, "by another process")
                    continue
                if not begun(run) and (run.folder / ".hydra").is_dir():  # else it would be replayed
                    shutil.rmtree(run.folder / ".hydra")
                self.jobs.append(Job(run, _process(run, output, self.processes)))

    def _collect(self) -> None:
        for job in list(self.jobs):
            code = job.process.poll()
            if code is None:
                continue
            self.jobs.remove(job)
            if outcome(job.run).completed:
                self.worked += job.seconds
                self.passes += job.run.cost
            elif code not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                _note_failure(job.run, code)
            self._say(job.run, f"{job.seconds:.0f} s")

    def _say(self, run: Planned, how: str) -> None:
        """A line of what came out of a run, and how long the others may take."""
        found = outcome(run)
        shown = [
            f"{m} {found.metrics[m]:.4f}" for m in ("test/acc", "val/acc") if m in found.metrics
        ]
        result = shown[0] if shown else f"{found.state}: {found.reason}".removesuffix(": ")
        ended = len(self.runs) - len(self.pending) - len(self.jobs)
        line = f"[{ended}/{len(self.runs)}] {run.folder.name}: {result}, {how}"
        if self.passes and (self.pending or self.jobs):
            passes = sum(r.cost for r in [*self.pending, *(job.run for job in self.jobs)])
            seconds = passes * self.worked / self.passes - sum(job.seconds for job in self.jobs)
            left = timedelta(seconds=round(max(0.0, seconds) / self.processes))
            line += f"; about {left} left"
        print(line)


def _locked(output: BinaryIO) -> bool:
    """Lock what a run prints to; False where another process has.

    The lock lasts as long as a process has the file open: also where a study was killed, and the
    runs that it has started go on.
    """
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _process(run: Planned, output: BinaryIO, processes: int) -> subprocess.Popen[bytes]:
    """Begin or continue a run."""
    environment = dict(os.environ)
    if processes > 1:  # alone, a run takes as many as PyTorch finds best
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))
    output.write(f"{PROMPT}{shlex.join(run.arguments)}\n".encode())
    # In a session of its own, so that Ctrl-C reaches the study alone, which passes it on once.
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *run.arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


def _note_failure(run: Planned, code: int) -> None:
    """Add to what a run has printed how it ended, unless it says so."""
    lines = _printed(run)
    if not any(line.startswith(ERROR) for line in lines):
        how = [*lines[-1:], outcome(run).reason, f"exit code {code}"]
        if code < 0:
            how = [f"ended by {signal.Signals(-code).name}"]
        with open(run.folder / OUTPUT, "a", encoding="utf-8") as output:
            output.write(f"{ERROR}{next(filter(None, how))}\n")

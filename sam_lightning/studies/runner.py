"""The processes of a study: side by side, each able to fail or to go on alone."""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import FrameType
from typing import Any, ClassVar

from sam_lightning.config.conf import CONF
from sam_lightning.config.errors import ConfigError, Interrupted, one_line
from sam_lightning.runs.files import RunStatus, read_status
from sam_lightning.runs.lock import OwnedError, owned
from sam_lightning.runs.secrets import without_secrets
from sam_lightning.studies.launchers import share_processors
from sam_lightning.studies.plan import RunSpec

TRAIN = CONF.parent / "train.py"
OUTPUT = "output.txt"  # what a run prints; locked while it runs
PROMPT = "$ python train.py "  # in front of each start there
ERROR = "error: "


def status(run: RunSpec) -> RunStatus:
    """What a run's folder says; of one that did not complete, the last error that it printed."""
    found = read_status(run.folder)
    if found.completed:
        return found
    errors = [line for line in _printed(run) if line.startswith(ERROR)]
    return replace(found, state="failed", reason=errors[-1][len(ERROR) :]) if errors else found


def begun(run: RunSpec) -> bool:
    """Whether there is anything to go on from; not so where a run was refused."""
    checkpoints = (run.folder / "checkpoints").glob("*.ckpt")
    return (run.folder / "metrics.json").exists() or any(checkpoints)


def _printed(run: RunSpec) -> list[str]:
    """What a run has printed since it was started last."""
    try:
        output = (run.folder / OUTPUT).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return output.rpartition(PROMPT)[2].strip().splitlines()[1:]


@dataclass
class Runner:
    """Runs what is not completed, ``processes`` at a time."""

    runs: Sequence[RunSpec]
    processes: int
    pending: list[RunSpec] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)  # until another process ends
    running: list[tuple[RunSpec, Any, float]] = field(default_factory=list)  # process, start
    seconds: float = 0  # of the runs completed here, and their passes
    passes: float = 0
    stopped: int | None = None  # by this signal
    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    poll: ClassVar[float] = 0.2  # seconds

    def run(self) -> None:
        """Run to the end, whatever fails; after a signal, once the runs have saved and ended."""
        # nohup ignores one.
        heeded = [s for s in self.signals if signal.getsignal(s) != signal.SIG_IGN]
        before = {signum: signal.signal(signum, self._handle) for signum in heeded}
        try:
            self._run()
        except OSError as error:
            raise ConfigError(f"{error.filename or 'the runs'}: {one_line(error)}") from error
        finally:
            for _, process, _ in self.running:
                process.terminate()
            for _, process, _ in self.running:
                process.wait()
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.stopped is not None:  # asked twice
            for _, process, _ in self.running:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        self.stopped = signum

    def _run(self) -> None:
        self.pending = [run for run in self.runs if not status(run).completed]
        done = len(self.runs) - len(self.pending)
        print(f"{len(self.runs)} runs: {done} completed before, {len(self.pending)} to go")
        while self.pending or self.running:
            if self.stopped is not None:
                print(f"stopped by {signal.Signals(self.stopped).name}; the runs save and end")
                raise Interrupted(self.stopped)
            self._start_some()
            time.sleep(self.poll)
            self._collect()

    def _start_some(self) -> None:
        """Start as many of the pending runs as may run now."""
        for run in list(self.pending):
            name = run.folder.name
            free = len(self.running) < self.processes
            if free and not self._start(run) and name not in self.waiting:
                print(f"{name}: already running elsewhere; waiting")
                self.waiting.add(name)

    def _start(self, run: RunSpec) -> bool:
        """Begin or continue a run, unless another process has it, as after a study was killed.

        The lock lasts as long as any process has the file open, so also while such a run goes on.
        """
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / OUTPUT, "ab", buffering=0) as output:
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with owned(run.folder):  # not so where somebody has started the run by hand
                    if not begun(run):  # what a refused run has left would be replayed
                        shutil.rmtree(run.folder / ".hydra", ignore_errors=True)
            except (BlockingIOError, OwnedError):
                return False
            self.pending.remove(run)
            if status(run).completed:
                self._say(run, "by another process")
                return True
            environment = dict(os.environ)
            if self.processes > 1:  # alone, a run takes as many as PyTorch finds best
                share_processors(self.processes, environment)
                environment.setdefault("OMP_NUM_THREADS", environment["LOKY_MAX_CPU_COUNT"])
            said = shlex.join(without_secrets(run.arguments))
            output.write(f"{PROMPT}{said}\n".encode())
            process = subprocess.Popen(
                [sys.executable, str(TRAIN), *run.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the study alone, which passes it on once
            )
        self.running.append((run, process, time.monotonic()))
        return True

    def _collect(self) -> None:
        for job in list(self.running):
            run, process, started = job
            code = process.poll()
            if code is None:
                continue
            self.running.remove(job)
            seconds = time.monotonic() - started
            if status(run).completed:
                self.seconds += seconds
                self.passes += run.passes
            elif code not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                self._failed(run, process, code)
            self._say(run, f"{seconds:.0f} s")

    def _failed(self, run: RunSpec, process: Any, code: int) -> None:
        killed = f"ended by {signal.Signals(-code).name}" if code < 0 else ""
        how = [killed, *_printed(run)[-1:], status(run).reason, f"exit code {code}"]
        note_failure(run, next(filter(None, how)))

    def _say(self, run: RunSpec, how: str) -> None:
        """A line of what came out of a run, and how long the others may take."""
        found = status(run)
        result = f"{found.state}: {found.reason}".removesuffix(": ")
        for name in ("val/acc", "test/acc"):
            if found.completed and name in found.metrics:
                result = f"{name} {found.metrics[name]:.4f}"
        left = [*self.pending, *(run for run, _, _ in self.running)]
        done = len(self.runs) - len(left)
        line = f"[{done}/{len(self.runs)}] {run.folder.name}: {result}, {how}"
        if self.passes and left:
            seconds = sum(run.passes for run in left) * self.seconds / self.passes / self.processes
            line += f"; about {timedelta(seconds=round(seconds))} left"
        print(line)


def note_failure(run: RunSpec, how: str) -> None:
    """Add to what a run has printed how it ended, unless it says so."""
    if not any(line.startswith(ERROR) for line in _printed(run)):
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / OUTPUT, "a", encoding="utf-8") as output:
            output.write(f"{ERROR}{how}\n" if output.tell() else f"{PROMPT}\n{ERROR}{how}\n")

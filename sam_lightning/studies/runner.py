"""The processes of a study: side by side, each able to fail or to go on alone."""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import FrameType
from typing import IO, ClassVar, NamedTuple

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
    return output.rpartition(PROMPT)[2].rstrip().splitlines()[1:]


class RunEnd(NamedTuple):
    """How a run has ended: ``failure`` is empty if it did not fail."""

    run: RunSpec
    failure: str
    seconds: float | None  # None if another process ran it


@dataclass
class Runner:
    """Runs what is not completed, ``processes`` at a time: joblib has a thread wait for each."""

    runs: Sequence[RunSpec]
    processes: int
    left: list[RunSpec] = field(default_factory=list)  # have not ended
    waiting: set[str] = field(default_factory=set)  # until another process ends
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    seconds: float = 0  # of the runs completed here, and their passes
    passes: float = 0
    stopped: BaseException | None = None  # by this
    told: bool = False  # whether the run that ended last was told to, by someone else
    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    poll: ClassVar[float] = 0.2  # seconds

    def run(self) -> None:
        """Run to the end, whatever fails; after a signal, once the runs have saved and ended."""
        # nohup ignores one.
        heeded = [s for s in self.signals if signal.getsignal(s) != signal.SIG_IGN]
        before = {signum: signal.signal(signum, self._handle) for signum in heeded}
        try:
            self._run()
        except BaseException as error:
            self.stopped = error
            for process in [*self.running]:
                process.wait()
            if isinstance(error, OSError):
                reason = error.strerror or one_line(error)
                raise ConfigError(f"{error.filename or 'the runs'}: {reason}") from error
            raise
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.stopped is None:
            self.stopped = Interrupted(signum)
            with suppress(RuntimeError):  # another line is being printed
                print(f"{self.stopped}; the runs save and end")
            return
        for process in [*self.running]:  # asked twice
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _run(self) -> None:
        self.left = [run for run in self.runs if not status(run).completed]
        done = len(self.runs) - len(self.left)
        print(f"{len(self.runs)} runs: {done} completed before, {len(self.left)} to go")
        with closing(self._ended()) as ended:
            for run, failure, seconds in ended:
                self.left.remove(run)
                if not status(run).completed:
                    note_failure(run, failure)
                elif seconds is not None:
                    self.seconds += seconds
                    self.passes += run.passes
                self._say(run, "by another process" if seconds is None else f"{seconds:.0f} s")
        if self.stopped is not None:
            raise self.stopped

    def _ended(self) -> Generator[RunEnd]:
        """Run what is left, and yield each run as it ends, until the study is stopped."""
        from joblib import Parallel, delayed

        threads = Parallel(self.processes, backend="threading", return_as="generator_unordered")
        while self.left and self.stopped is None:
            yield from filter(None, threads(map(delayed(self._one), [*self.left])))
            if self.left:  # other processes have them
                time.sleep(self.poll)

    def _one(self, run: RunSpec) -> RunEnd | None:
        """Begin or continue a run, and wait for its end, unless another process has it.

        The lock lasts as long as any process has the file open, so also while such a run goes on
        after its study was killed.
        """
        if self.stopped is not None:
            return None
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / OUTPUT, "ab", buffering=0) as output:
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with owned(run.folder):  # not so where somebody has started the run by hand
                    if not begun(run):  # what a refused run has left would be replayed
                        shutil.rmtree(run.folder / ".hydra", ignore_errors=True)
            except (BlockingIOError, OwnedError):
                if run.folder.name not in self.waiting:
                    print(f"{run.folder.name}: already running elsewhere; waiting")
                    self.waiting.add(run.folder.name)
                return None
            if status(run).completed:
                return RunEnd(run, "", None)
            started = time.monotonic()
            code = self._process(run, output)
        killed = f"ended by {signal.Signals(-code).name}" if code < 0 else ""
        how = [killed, *_printed(run)[-1:], status(run).reason, f"exit code {code}"]
        saved = code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        self.told = saved or code in (-signal.SIGINT, -signal.SIGTERM)  # or not begun
        failure = "" if saved else next(filter(None, how))
        return None if self.stopped else RunEnd(run, failure, time.monotonic() - started)

    def _process(self, run: RunSpec, output: IO[bytes]) -> int:
        """The exit code of a run's process, which is told to save and end if the study stops."""
        environment = dict(os.environ)
        if self.processes > 1:  # alone, a run takes as many as PyTorch finds best
            share_processors(self.processes, environment)
            environment.setdefault("OMP_NUM_THREADS", environment["LOKY_MAX_CPU_COUNT"])
        output.write(f"{PROMPT}{shlex.join(without_secrets(run.arguments))}\n".encode())
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *run.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the study alone, which passes it on once
        )
        self.running.append(process)
        try:
            while process.poll() is None and self.stopped is None:
                time.sleep(self.poll)
        finally:  # also as submitit ends a job whose time is up
            process.terminate()
            code = process.wait()
            self.running.remove(process)
        return code

    def _say(self, run: RunSpec, how: str) -> None:
        """A line of what came out of a run, and how long the others may take."""
        found = status(run)
        result = f"{found.state}: {found.reason}".removesuffix(": ")
        for name in ("val/acc", "test/acc"):
            if found.completed and name in found.metrics:
                result = f"{name} {found.metrics[name]:.4f}"
        done = len(self.runs) - len(self.left)
        line = f"[{done}/{len(self.runs)}] {run.folder.name}: {result}, {how}"
        if self.passes and self.left:
            passes = sum(run.passes for run in self.left)
            seconds = passes * self.seconds / self.passes / self.processes
            line += f"; about {timedelta(seconds=round(seconds))} left"
        print(line)


def note_failure(run: RunSpec, how: str) -> None:
    """Add to what a run has printed how it ended, unless it says so."""
    if how and not any(line.startswith(ERROR) for line in _printed(run)):
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / OUTPUT, "a", encoding="utf-8") as output:
            output.write(f"{ERROR}{how}\n" if output.tell() else f"{PROMPT}\n{ERROR}{how}\n")

"""The runs of a study as one array of SLURM's jobs, by submitit."""

import io
import os
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from sam_lightning.config.errors import ConfigError, Interrupted, one_line
from sam_lightning.studies.launchers import refuse_secrets, with_squeue
from sam_lightning.studies.plan import RunSpec
from sam_lightning.studies.runner import Runner, note_failure

CLUSTER = "slurm"
# SLURM sends it to all processes of a job before its time is up. Only submitit shall heed it: it
# lets the run save, and queues the job again. Processes ignore it by default.
SIGNAL = "URG"
RESTARTS = 1000  # of a job whose time is up


class Job:
    """What a job does: one run, in a process, as a study does that runs here."""

    runner = Runner((), 1)

    def __call__(self, run: RunSpec) -> None:
        """Called by submitit in the job."""
        self.runner = Runner([run], 1, signals=())  # the run itself is told, as all of the job
        self.runner.run()

    def checkpoint(self, run: RunSpec) -> Any:
        """Called by submitit before the time is up: let the run save; return the job to queue."""
        from submitit.helpers import DelayedSubmission

        for _, process, _ in self.runner.running:
            with suppress(ChildProcessError):  # it has ended
                process.terminate()
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ``runner`` reaps it
        return DelayedSubmission(Job(), run)


@dataclass
class Submitted:
    """A job, with what ``Runner`` needs of a process."""

    job: Any

    def poll(self) -> int | None:
        """None until the job has ended, then 0 unless it was killed."""
        return int(not self.job.paths.result_pickle.exists()) if self.job.done() else None

    def terminate(self) -> None:
        """Take the job out of the queue, or let its run save and end."""
        self.job.cancel(check=False)

    def wait(self) -> None:
        """Wait for its end."""
        while not self.job.done(force_check=True):
            time.sleep(1)


class Array(Runner):
    """Sends what is not completed as one array, ``processes`` at a time."""

    poll = 1.0

    def __init__(self, runs: Sequence[RunSpec], jobs: int | None, slurm: str | None):
        super().__init__(runs, jobs or len(runs))
        self.slurm = slurm
        refuse_secrets(a for run in runs for a in run.arguments)
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL  # read when submitit is imported
        submitit = with_squeue("launcher=submitit", "jobs=N for N runs at a time on this machine")
        name = runs[0].folder.parent.name
        folder = runs[0].folder.parents[1] / ".submitit" / name / "%j"
        self.executor = submitit.AutoExecutor(folder, CLUSTER, slurm_max_num_timeout=RESTARTS)
        given = [word.removeprefix("--").partition("=") for word in (slurm or "").split()]
        self.executor.update_parameters(
            name=name,
            timeout_min=60,  # or what ``slurm`` says
            slurm_array_parallelism=self.processes,
            slurm_setup=[
                f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}",
                # srun does not take it from sbatch.
                "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
            ],
            slurm_signal_delay_s=90,
            slurm_additional_parameters={"requeue": True} | {k: v or True for k, _, v in given},
        )

    def _start_some(self) -> None:
        if self.pending:
            try:
                with redirect_stderr(io.StringIO()):
                    jobs = self.executor.map_array(Job(), self.pending)
            except Exception as error:  # what sbatch says
                folder = self.executor.folder.parent
                for file in folder.glob("*.*"):  # of what was not sent
                    file.unlink()
                with suppress(OSError):
                    os.removedirs(folder)
                raise ConfigError(f"slurm={self.slurm}: {one_line(error)}") from error
            print(f"sent as job {jobs[0].job_id.partition('_')[0]}")
            sent = zip(self.pending, map(Submitted, jobs), strict=True)
            self.running = [(run, job, 0.0) for run, job in sent]
            self.pending.clear()
        now = time.monotonic()  # time in the queue does not count
        self.running = [
            (r, s, t if s.job.paths.stdout.exists() else now) for r, s, t in self.running
        ]

    def _failed(self, run: RunSpec, process: Submitted, code: int) -> None:
        if code:  # else the job has said how the run ended
            job = process.job
            note_failure(run, f"job {job.job_id} was killed; see {job.paths.stderr}")

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.stopped is not None:  # asked twice: jobs that were cancelled end alone
            raise Interrupted(signum)
        self.stopped = signum

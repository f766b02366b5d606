"""The runs of a study as one array of SLURM's jobs, by submitit."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import redirect_stderr, suppress
from types import FrameType
from typing import Any

from sam_lightning.config.errors import ConfigError, Interrupted, one_line
from sam_lightning.runs.files import read_summary, write_json
from sam_lightning.studies.launchers import refuse_secrets, with_squeue
from sam_lightning.studies.plan import RunSpec
from sam_lightning.studies.runner import RunEnd, Runner

CLUSTER = "slurm"
# SLURM sends it to all processes of a job before its time is up. Only submitit shall heed it: it
# lets the run save, and queues the job again. Processes ignore it by default.
SIGNAL = "URG"
RESTARTS = 1000  # of a job whose time is up
SENT = "job.json"  # in a run's folder: the job that was sent last


class Job:
    """What a job does: one run, in a process, as a study does that runs here."""

    runner = Runner((), 1)

    def __call__(self, run: RunSpec) -> None:
        """Called by submitit in the job."""
        self.runner = Runner([run], 1, signals=())  # the run itself is told, as all of the job
        self.runner.run()
        if self.runner.told:  # by SLURM, which may queue the job again
            sys.exit(f"{run.folder}: was told to stop")  # and then it has no result yet

    def checkpoint(self, run: RunSpec) -> Any:
        """Called by submitit before the time is up: let the run save; return the job to queue."""
        from submitit.helpers import DelayedSubmission

        for process in self.runner.running:
            with suppress(ChildProcessError):  # it has ended
                process.terminate()
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ``runner`` reaps it
        return DelayedSubmission(Job(), run)


class Array(Runner):
    """Sends what is not completed as one array, ``processes`` at a time."""

    def __init__(self, runs: Sequence[RunSpec], jobs: int | None, slurm: str | None):
        super().__init__(runs, jobs or len(runs))
        self.slurm = slurm
        refuse_secrets(a for run in runs for a in run.arguments)
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL  # read when submitit is imported
        study = runs[0].folder.parent
        folder = (study.parent / ".submitit" / study.name).absolute()
        instead = "jobs=N for N runs at a time on this machine"
        submitit = with_squeue("launcher=submitit", instead, folder)
        folder /= "%j"
        self.executor = submitit.AutoExecutor(folder, CLUSTER, slurm_max_num_timeout=RESTARTS)
        given = [word.removeprefix("--").partition("=") for word in (slurm or "").split()]
        self.executor.update_parameters(
            name=study.name,
            nodes=1,
            tasks_per_node=1,  # with --exclusive srun would start one for each processor
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

    def _ended(self) -> Generator[RunEnd]:
        """Send what is left as one array, and yield each run as its job ends."""
        jobs = self._jobs() if self.left else []
        begun: dict[str, float] = {}  # time in the queue does not count
        reasons = {"None"}
        try:
            while jobs and self.stopped is None:
                time.sleep(1)
                for run, job in [*jobs]:
                    if job.paths.stdout.exists():
                        begun.setdefault(job.job_id, time.monotonic())
                    if job.done():
                        jobs.remove((run, job))
                        now = time.monotonic()
                        yield RunEnd(run, _failure(job), now - begun.get(job.job_id, now))
                    elif (reason := job.get_info("cache").get("Reason", "None")) not in reasons:
                        print(f"job {job.job_id} waits in the queue: {reason}")
                        reasons.add(reason)
        finally:
            _cancel([job for _, job in jobs])

    def _jobs(self) -> list[tuple[RunSpec, Any]]:
        """The job of each run that is left: the one that it has in the queue, or a new one."""
        earlier = [(run, sent) for run in self.left if (sent := read_summary(run.folder / SENT))]
        folder, job_class = self.executor.folder, self.executor._executor.job_class
        jobs = [job_class(folder, str(sent.get("job"))) for _, sent in earlier]
        queued = []
        for (run, sent), job in zip(earlier, jobs, strict=True):
            if job.done():
                continue
            if not job.get_info("cache"):  # else jobs that are gone would count as killed
                raise ConfigError("launcher=submitit: squeue does not answer; start it again later")
            if sent.get("arguments") != run.arguments:
                advice = f"undo the change, or scancel {job.job_id}"
                raise ConfigError(f"{run.folder}: has a job of other overrides; {advice}")
            queued.append((run, job))
        if queued:
            print(f"{len(queued)} in the queue already, as job {_number(queued[0][1])}")
        there = [run for run, _ in queued]
        return queued + self._send([run for run in self.left if run not in there])

    def _send(self, runs: Sequence[RunSpec]) -> list[tuple[RunSpec, Any]]:
        if not runs:
            return []
        try:
            with redirect_stderr(io.StringIO()):
                jobs = self.executor.map_array(Job(), runs)
        except Exception as error:  # what sbatch says
            folder = self.executor.folder.parent
            for file in folder.glob("*.*"):  # of what was not sent
                file.unlink()
            with suppress(OSError):
                os.removedirs(folder)
            raise ConfigError(f"slurm={self.slurm}: {one_line(error)}") from error
        print(f"sent as job {_number(jobs[0])}")
        for run, job in zip(runs, jobs, strict=True):
            sent = {"job": job.job_id, "arguments": run.arguments}
            write_json(run.folder / SENT, sent, "hydra.run.dir")
        return [*zip(runs, jobs, strict=True)]

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.stopped is not None:  # asked twice: jobs that were cancelled end alone
            raise Interrupted(signum)
        super()._handle(signum, frame)


def _number(job: Any) -> str:
    return job.job_id.partition("_")[0]


def _failure(job: Any) -> str:
    """Why a run whose job has ended failed; empty if the job itself has noted that."""
    if job.paths.result_pickle.exists():
        return ""
    if job.paths.stderr.exists():
        return f"job {job.job_id} was killed; see {job.paths.stderr}"
    gone = f"job {job.job_id} has not begun: it was taken out of the queue"
    return f"{gone}, or its machine cannot write to {job.paths.folder}"


def _cancel(jobs: Sequence[Any]) -> None:
    """Take jobs out of the queue, or let their runs save and end; wait for that."""
    for job in jobs:
        try:
            job.cancel()
        except subprocess.CalledProcessError:  # it has ended, or SLURM does not answer
            if not job.done(force_check=True):
                print(f"job {_number(job)} stays in the queue; the same command goes on with it")
                return
    while not all(job.done(force_check=True) for job in jobs):
        time.sleep(1)

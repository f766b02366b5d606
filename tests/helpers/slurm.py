"""A real SLURM of two nodes in a folder: as root, without systemd, apart from any other here."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from runs import wait_for_end
from sam_lightning.config.conf import CONF

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
CPUS = 18  # as configured; the script of docs/results.md asks for nine a run
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again begins after cred_expire seconds, two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE PriorityTier=2
PartitionName=lent Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=1 GraceTime=100
"""

NODE = f"NodeName={{}} NodeHostname={socket.gethostname().partition('.')[0]} NodeAddr=127.0.0.1 "
NODE += f"Port={{}} CPUs={CPUS} RealMemory=1000 Gres=gpu:2"


def missing() -> str:
    """Why there can be no SLURM here, or nothing."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"{', '.join(absent)}: not installed; make test-slurm does that on Debian and Ubuntu"
    return "" if os.getuid() == 0 else "its daemons need root"


class Slurm:
    """The daemons, and the commands that a user types, in a folder with train.py as in a clone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        host = socket.gethostname().partition(".")[0]
        self.nodes = (host, "localhost")  # two names of this machine
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir()
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in sockets]
        nodes = "\n".join(map(NODE.format, self.nodes, ports[1:]))
        parts = {"host": host, "port": ports[0], "folder": folder, "nodes": nodes}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**parts))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n")
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        given = [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]
        self.environment = {k: v for k, v in os.environ.items() if k not in given}
        self.environment |= {
            "SLURM_CONF": f"{folder}/slurm.conf",
            # The python of the docs' commands is that of the tests.
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"]
            ),
            "PYTHONPATH": os.pathsep.join([str(CONF.parent), os.environ.get("PYTHONPATH", "")]),
        }
        names = {"key-file": "key", "socket": "munge.socket", "seed-file": "seed"}
        names |= {"pid-file": "munged.pid", "log-file": "munged.log"}
        self("munged", "--force", *(f"--{k}={folder / v}" for k, v in names.items()))
        self("slurmctld")
        for node in self.nodes:
            self("slurmd", "-N", node)
        self.wait(
            lambda: self("sinfo", "--noheader", "--format=%t %D").split() == ["idle", "2"], 60
        )

    def __call__(self, *command: str, cwd: Path | None = None) -> str:
        """What a command prints, which has to end well."""
        done = self.run(*command, cwd=cwd)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        where = {"cwd": cwd or self.folder, "env": self.environment}
        return subprocess.run(command, capture_output=True, text=True, timeout=600, **where)

    def clone(self, folder: Path) -> Path:
        """A folder to type commands in."""
        for name in ("train.py", "conf", "sam_lightning"):
            (folder / name).symlink_to(CONF.parent / name)
        return folder

    def submit(self, cwd: Path, *arguments: str) -> str:
        """The number of a job that was given to sbatch."""
        return self("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def state(self, job: str, of: str = "JobState") -> str:
        """The state of a job, or something else that SLURM says of it."""
        return re.search(rf"\b{of}=(\S+)", self("scontrol", "show", "job", job))[1]

    def wait_for(self, job: str, seconds: float = 240) -> str:
        """The state of a job that has ended."""
        self.wait(lambda: not self("squeue", "--noheader", f"--jobs={job}"), seconds)
        return self.state(job)

    def wait(self, holds, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.said()
            time.sleep(0.5)

    def said(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.folder.glob("slurm*.log"))

    def end(self) -> None:
        """End all jobs, and the daemons by their numbers."""
        self.run("scancel", "--signal=KILL", "--user=root")
        self.run("scancel", "--user=root")
        names = [*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged"]
        for file in (self.folder / f"{name}.pid" for name in names):
            if file.is_file():
                pid = int(file.read_text())
                os.kill(pid, signal.SIGTERM)
                wait_for_end([pid])

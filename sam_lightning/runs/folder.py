"""The folder of a run: writable, and not another run's."""

import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_lightning.config.cluster import check_node, is_first, number
from sam_lightning.config.errors import ConfigError, Ended, LocalError
from sam_lightning.config.text import clean
from sam_lightning.config.values import Rule, check_value
from sam_lightning.runs.files import make_folder
from sam_lightning.runs.lock import kept, owned
from sam_lightning.runs.secrets import hide_secrets_of, without_secrets

# A folder of this name is made below logs, so the name must not lead out of it.
TaskName = Annotated[
    str | int,
    Rule(
        "a name of letters, digits, -, _ and .",
        lambda v: bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", str(v))),
    ),
]


# What Hydra and a run write into the folder of a run or sweep, and what is a result of it.
WRITTEN = {".hydra", ".lock", "tensorboard", "checkpoints", "split.json"}
WRITTEN |= {"metrics.csv", "metrics.json", "multirun.yaml", "optuna.db", "sweep.json"}
RESULTS = ("metrics.csv", "metrics.json", "*.ckpt", "sweep.json")


class Started:
    """A folder that a process begins to write to.

    Args:
        path: of the folder, which need not be there yet.
        log: the name of the file that Hydra logs to.
        of_sweep: it has folders of jobs.
        jobs_elsewhere: whether other processes write to these.
    """

    def __init__(
        self, path: Path, log: str, of_sweep: bool = False, jobs_elsewhere: bool = False
    ) -> None:
        self.path, self.written = path.absolute(), {*WRITTEN, log}
        self.of_sweep, self.jobs_elsewhere = of_sweep, jobs_elsewhere
        self.missing = [part for part in (self.path, *self.path.parents) if not part.exists()]
        self.before = {*os.listdir(self.path)} if self.path.is_dir() else set[str]()

    def discard(self) -> None:
        """Leave the folder as it was, or not at all, unless there is a result in it by now."""
        if not self.path.is_dir() or (self.jobs_elsewhere and any(self.path.glob("*/*"))):
            return
        new = [e for e in self.path.iterdir() if e.name not in self.before]
        written = [e for e in new if e.name in self.written or (self.of_sweep and _is_of_job(e))]
        found = (file for entry in written for file in (entry, *entry.rglob("*")))
        if any(file.match(name) for file in found for name in RESULTS):
            return
        with suppress(OSError):  # something else is there
            for entry in written:
                linked = entry.is_symlink()
                shutil.rmtree(entry) if entry.is_dir() and not linked else entry.unlink()
            for part in self.missing:
                part.rmdir()


def _is_of_job(entry: Path) -> bool:
    """Whether Hydra has made it for a job of a sweep."""
    named = entry.name[0].isdigit() and entry.is_dir()
    return named and ((entry / ".hydra").is_dir() or not any(entry.iterdir()))


class RunFolder(Callback):
    """Makes the folder before Hydra does, because Hydra's errors name no key and no remedy.

    Owns it too, because Hydra would write to it even where another process is at work.
    """

    started: Started | None = None  # by the run of this process

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before it writes anything."""
        nodes = OmegaConf.select(config, "trainer.num_nodes", throw_on_missing=False)
        try:
            if isinstance(nodes, int):
                check_node(nodes)  # else two hosts take the folder
        except ConfigError as error:
            refuse(str(error))
        if not is_first():  # rank 0 alone has a folder
            return
        part = config.hydra.output_subdir
        if part not in (None, ".hydra"):
            refuse(f"hydra.output_subdir={part}: allowed are .hydra, null")
        folder = folder_of(config, "hydra.run.dir")
        if (folder.parent / "multirun.yaml").is_file() and not (folder / ".hydra").exists():
            try:  # a sweep at work there would come to this folder later
                with owned(folder.parent, "hydra.run.dir"):
                    pass
            except ConfigError as error:
                refuse(str(error))
        started = Started(folder, f"{config.hydra.job.name}.log")
        own(folder, "hydra.run.dir")
        RunFolder.started = started
        if part is None:  # the run continues in its old folder
            return
        # A wrong "${...}" is refused later.
        given = "ckpt_path" in config and not OmegaConf.is_interpolation(config, "ckpt_path")
        again = given and config.ckpt_path == "last"
        try:
            # A run that restarts again and again with ckpt_path=last may find what was killed
            # before it had written anything.
            (folder / part).mkdir(exist_ok=again)
        except FileExistsError:
            refuse(
                f"hydra.run.dir={folder}: has a run already; continue it with ckpt_path=last "
                f"hydra.run.dir={folder}, or name another folder"
            )
        except OSError as error:
            refuse(f"hydra.output_subdir={part}: cannot be made ({error.strerror})")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take tokens and passwords out of what Hydra has just stored."""
        given: Any = OmegaConf.to_container(config)
        hide_secrets_of(given)
        if without_secrets(given) == given:
            return
        files = [*Path(config.hydra.runtime.output_dir).glob(".hydra/*.yaml")]
        files += Path(config.hydra.sweep.dir).glob("multirun.yaml")
        for file in files:
            stored = OmegaConf.to_container(OmegaConf.load(file))
            OmegaConf.save(OmegaConf.create(without_secrets(stored)), file)


def folder_of(config: DictConfig, key: str) -> Path:
    """The folder that a key of Hydra's names; ends the process if it names none."""
    try:
        check_value("task_name", config.get("task_name"), TaskName)
        path = str(OmegaConf.select(config, key) or "")
        if not path:
            raise ConfigError(f"{key}=: must be the path of a folder")
        return Path(path)
    except ConfigError as error:
        refuse(str(error))
    except OmegaConfBaseException as error:
        refuse(f"{key}: {str(error).splitlines()[0]}")


def own(folder: Path, key: str) -> None:
    """Make the folder and keep others out of it as long as this process lives, or end it."""
    try:
        kept.enter_context(owned(make_folder(folder, folder, key), key))
    except ConfigError as error:
        refuse(str(error))


def refuse(message: str) -> NoReturn:
    """End the process with one line and exit code 2, from a callback of Hydra.

    It raises a SystemExit, because Hydra turns other errors of its callbacks into warnings. Under
    torchrun or SLURM only the first process of a host prints the line.
    """
    if number("LOCAL_RANK", number("SLURM_LOCALID", 0)) == 0:
        print(f"error: {clean(without_secrets(message))}", file=sys.stderr)
    raise Ended(2, LocalError(message))

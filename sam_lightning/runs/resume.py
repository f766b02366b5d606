"""``ckpt_path=...``: which run continues, and which of its stored overrides it takes.

A run's folder may come from a stranger, and Hydra's arguments can name launchers or other
configurations. So resuming takes only settings of a run, and no strangers' code.
"""

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from sam_lightning.config.conf import CONF, is_group, top_level
from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.config.hydra_errors import explain, key_of, quoted, unquoted
from sam_lightning.config.text import clean
from sam_lightning.config.trust import check_places, check_targets, trust_arguments
from sam_lightning.config.values import check_value
from sam_lightning.runs.files import stored_overrides
from sam_lightning.runs.folder import TaskName
from sam_lightning.runs.old_names import with_current_names

# What a run writes into its folder.
OWN = {".hydra", "checkpoints", "tensorboard", "metrics.csv", "metrics.json", "train.log"}


def resumed(arguments: list[str]) -> list[str]:
    """Add the stored overrides of the run that ``ckpt_path=...`` names.

    ``ckpt_path`` is a checkpoint, a run's folder, or ``last``. ``last`` is the folder
    ``hydra.run.dir`` if given, with or without a run in it, else the newest run. The stored
    overrides come first, and the ones given now win. The run writes to its own folder, and does
    not write its stored configuration again.

    Raises:
        ConfigError: there is no run to continue, or its overrides name strangers' code.
    """
    given = {key_of(a): unquoted(a.partition("=")[2]) for a in arguments}
    sweeps = given.get("sweep", "null") != "null" or given.get("hydra.mode") == "MULTIRUN"
    if "ckpt_path" not in given or sweeps or {"-m", "--multirun"} & {*arguments}:
        return arguments
    path = Path(os.path.expanduser(given["ckpt_path"]))
    if given["ckpt_path"] == "last":
        folder = Path(given["hydra.run.dir"]) if "hydra.run.dir" in given else _newest_run(given)
    elif given["ckpt_path"] and path.exists():
        # Quoted, because the name of a sweep's folder contains "=" and ",".
        named = f"ckpt_path={quoted(str(path))}"
        arguments = [named if key_of(a) == "ckpt_path" else a for a in arguments]
        folder = path if path.is_dir() else path.parent
        folder = folder.parent if folder.name == "checkpoints" else folder
    else:
        return arguments
    folder = folder.resolve()
    stored = folder / ".hydra" / "overrides.yaml"
    if not stored.is_file():
        return arguments
    trust_arguments(arguments)
    kept = replayable(stored, top_level(), arguments)
    if "hydra.run.dir" not in given:
        arguments = [*arguments, f"hydra.run.dir={quoted(str(folder))}"]
    if Path(given.get("hydra.run.dir", folder)).resolve() == folder:
        arguments = [*arguments, "hydra.output_subdir=null"]
    # One run, also if the stored configuration asked for a sweep.
    return [*kept, *arguments, "hydra.mode=RUN"]


def _newest_run(given: dict[str, str]) -> Path:
    """The newest run of the task that is given, or of any, by the time in the folder's name."""
    if "task_name" in given:
        check_value("task_name", given["task_name"], TaskName)
    task = given.get("task_name", "**")
    file = CONF / "experiment" / f"{given.get('experiment')}.yaml"
    if "task_name" not in given and file.is_file():
        task = OmegaConf.select(OmegaConf.load(file), "task_name", default=task)
    runs = {file.parent.parent for file in Path("logs").glob(f"{task}/runs/*/checkpoints/*.ckpt")}
    if not runs:
        folder = "logs" if task == "**" else f"logs/{task}/runs"
        raise ConfigError(f"ckpt_path=last: there is no run with a checkpoint in {folder}")
    return max(runs, key=lambda run: run.name)


def replayable(file: Path, settings: Iterable[str], given: Collection[str] = ()) -> list[str]:
    """The overrides in a run's ``.hydra/overrides.yaml``, without values that are ``given`` now.

    Args:
        file: the list of overrides as Hydra stored it.
        settings: the keys that may stand at the top of a configuration.
        given: arguments, or keys, whose stored values are ignored, so they may be anything. A key
            that was added with + is there still, so what is given can change or delete it.

    Raises:
        ConfigError: the file cannot be read, or an override is none of the run's own settings: one
            of Hydra, a choice that is not in ``conf``, code that is not trusted, a place to write
            to outside of the run, or a value that asks for more than other keys, such as
            ``${oc.env:...}``. Or the folder has a link that leads out of it.
    """
    folder = file.parents[1].resolve()
    _check_links(folder)
    stored = with_current_names(stored_overrides(file))
    try:
        overrides = OverridesParser.create().parse_overrides(stored)
    except Exception as error:  # of Hydra, and of Python where it is nested too deep
        reason = clean(explain(error, []))
        raise ConfigError(f"{file}: not a list of overrides ({reason})") from error
    allowed = {*settings} - {"output_dir", "ckpt_path"}
    replaced = {key_of(a): a for a in given}
    kept = [o for o in overrides if o.key_or_group not in (*replaced, "ckpt_path")]
    for override in kept:
        if not _is_setting(override, allowed):
            raise ConfigError(
                f"{file}: {clean(override.input_line)}: may not come out of a run folder; take it "
                "out there, or give that key yourself"
            )
        if override.is_delete():
            continue
        node = OmegaConf.create({})
        OmegaConf.update(node, override.key_or_group, override.value(), force_add=True)
        plain = OmegaConf.to_container(node, resolve=False)
        try:  # strangers' code, or a place outside, in the key or anywhere in the value
            check_targets(plain, remedy="type {key}._target_={target} too")
            check_places(plain, folder)
        except ConfigError as error:
            raise ConfigError(f"{file}: {one_line(error)}") from error
    replayed = []
    for override in overrides:
        key, added = override.key_or_group, override.is_add() or override.is_force_add()
        if override in kept:
            replayed.append(str(override.input_line))
        elif added and key.partition(".")[0] in allowed and not replaced[key].startswith("+"):
            replayed.append(f"++{key}=0")
    # A place from there is read; only a place that is typed gets files that are missing.
    return [*replayed, "++data.download=false"] if any("root" in o for o in replayed) else replayed


def _check_links(folder: Path) -> None:
    """Refuse to write to what leads out of a run's folder, or is no file.

    A stranger's folder may hold links. Where the folder holds the working directory too, as with
    ``hydra.run.dir=.``, what does not belong to the run may lead anywhere.
    """
    for path, below, files in os.walk(folder):
        if Path.cwd().is_relative_to(path):
            below[:] = [name for name in below if name in OWN]
            files = [name for name in files if name in OWN]
        for entry in (Path(path, name) for name in (*below, *files)):
            if not entry.resolve().is_relative_to(folder):
                raise ConfigError(
                    f"{entry}: leads out of the run's folder; put a copy in its place"
                )
            if entry.exists() and not (entry.is_file() or entry.is_dir()):
                raise ConfigError(f"{entry}: is no file and no folder; a run writes there")


def _is_setting(override: Override, allowed: set[str]) -> bool:
    key = override.key_or_group
    named = override.package is None and "/" not in key and key.partition(".")[0] in allowed
    if not named or override.is_sweep_override():
        return False
    value = str(override.value())
    if is_group(key):
        return bool(re.fullmatch(r"[\w\[\], ']+", value))  # names, else it could be a path
    return "${" not in re.sub(r"\$\{[\w.]+\}", "", value)

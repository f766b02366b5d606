"""Processes that are connected: before Lightning comes, with errors that name who is lost."""

import hashlib
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.cluster import as_torchrun, number
from sam_lightning.config.conf import flat
from sam_lightning.config.errors import ConfigError, TrainingError
from sam_lightning.runs.parts import ALWAYS, when
from sam_lightning.runs.record import PACKAGES
from sam_lightning.runs.secrets import without_secrets
from sam_lightning.training.ranks import Ranks, post
from sam_lightning.training.store import CONNECTS_WITHIN, is_ours, meeting_place, open_store

# What gloo says, and the store before gloo is connected.
LOST = re.compile("gloo/transport|Gloo connect|Timed out waiting|Wait timeout|Timeout waiting")
PATIENCE = 60.0  # seconds; a rank that fails waits for ranks that still start


@contextmanager
def connected(trainer: DictConfig, store: dist.Store | None = None) -> Iterator[None]:
    """Connect the processes in the block before Lightning does, because one prepares the data.

    They wait for each other at most ``trainer.timeout`` seconds. On one machine, without a
    launcher, they meet in ``store``; all others at MASTER_ADDR and MASTER_PORT. If one of them
    fails, so do all, with an error that says which.

    Raises:
        ConfigError: of the launcher's variables; or versions differ between hosts.
        TrainingError: names ranks that do not come, or do not answer.
    """
    if dist.is_initialized():  # by other code
        yield
        return
    cuda = trainer.accelerator != "cpu" and torch.cuda.is_available()
    Ranks.begun = True
    ranks = Ranks.now = Ranks(trainer, store)
    try:
        with named_lost():
            if store is None:
                ranks.come()
                ranks.agree({"trainer.accelerator": "cuda" if cuda else "cpu", **_versions()})
                if not cuda:  # NCCL has ways of its own
                    ranks.reach_each_other()
            _init_process_group(trainer, ranks, cuda)
            yield
    except Exception as error:
        ranks.tell(error)
        if ranks.hosts_store:
            time.sleep(1)  # so that the others can read it
        raise
    finally:
        Ranks.now = None
    # Otherwise gloo's threads may free a tensor while Python shuts down, which aborts a process
    # that has done all its work (pytorch issue 190489). Not after an error: it could wait for a
    # dead one.
    dist.destroy_process_group()


def _init_process_group(trainer: DictConfig, ranks: Ranks, cuda: bool) -> None:
    if cuda:
        # NCCL takes the current device, which is the first one in every process until Lightning
        # sets it, later on.
        local = number("LOCAL_RANK", 0)
        devices = trainer.devices
        torch.cuda.set_device(local if isinstance(devices, int | str) else devices[local])
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=ranks.store,
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=timedelta(seconds=ranks.timeout),
    )


@contextmanager
def named_lost() -> Iterator[None]:
    """Replace an error of a connection by one that says which rank is lost, and on which host."""
    try:
        yield
    except RuntimeError as error:
        if Ranks.now is None or not is_lost(error):
            raise
        raise Ranks.now.lost(error) from error


def is_lost(error: Exception) -> bool:
    """Whether an error is one of a connection."""
    said = isinstance(error, RuntimeError) and LOST.search(str(error))
    return bool(said or isinstance(error, dist.DistError)) and not isinstance(error, TrainingError)


def agree(about: Callable[[], Mapping[str, Any]]) -> None:
    """Compare something, by name, over all processes that meet on a network, if they do.

    Raises:
        ConfigError: names the first that differs, and two hosts where it does.
    """
    if Ranks.now is not None and Ranks.now.hosts:
        Ranks.now.agree(about())


def shared_settings(cfg: DictConfig) -> dict[str, Any]:
    """The settings that must be the same on all hosts."""
    here: Any = OmegaConf.to_container(
        OmegaConf.merge(cfg, {"output_dir": "OUTPUT_DIR", "ckpt_path": None}), resolve=True
    )
    settings = {k: v for k, v in flat(without_secrets(here)).items() if not _is_own(k, v)}
    return settings | _code_of_user([str(v) for k, v in settings.items() if k.endswith("_target_")])


def _is_own(key: str, value: Any) -> bool:
    reads = key.startswith("data.") and when(key) == ALWAYS and key != "data.eval_batch_size"
    return reads or key == "traceback" or isinstance(value, dict)


def _versions() -> dict[str, str]:
    found = {"version of python": platform.python_version()}
    for name in (*PACKAGES, "pillow", "timm"):
        with suppress(PackageNotFoundError):  # timm is optional
            found[f"version of {name}"] = version(name)
    return {**found, "code of sam_lightning": _code(Path(__file__).parents[1])}


def _code_of_user(names: Iterable[str]) -> dict[str, str]:
    """Hashes of the modules and packages from which the user's own objects come, such as a model.

    Args:
        names: of objects, such as ``my_models.nets.Net``. Installed packages do not count.
    """
    found = {}
    for top in {name.partition(".")[0] for name in names} - {"sam_lightning"}:
        spec = find_spec(top)
        if spec is None or not spec.has_location or "-packages" in str(spec.origin):
            continue
        file = Path(str(spec.origin))
        found[f"code of {top}"] = _code(file.parent if spec.submodule_search_locations else file)
    return found


def _code(place: Path) -> str:
    """A hash of a file, or of all Python files in a folder."""
    code = hashlib.sha256()
    for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        code.update(file.relative_to(place).as_posix().encode() + file.read_bytes())
    return code.hexdigest()[:12]


def tell(error: BaseException, nodes: int) -> None:
    """Let the other processes know why this one does not come, or those of its host.

    Args:
        nodes: how many hosts there are, where each starts its processes itself.
    """
    if Ranks.begun:  # they know
        return
    with suppress(ConfigError, TrainingError, RuntimeError):
        as_torchrun()
        rank, who, size = number("RANK", -1), socket.gethostname(), nodes
        if rank >= 0:
            who, size = f"rank {rank} on {who}", number("WORLD_SIZE", 1)
        ours = is_ours(rank if rank >= 0 else number("NODE_RANK", -1))
        store = open_store(meeting_place(), ours, PATIENCE)
        begun, said = time.monotonic(), False
        # The store may end with this process, or with the agent of torchrun.
        holds = ours or "TORCHELASTIC_RUN_ID" in os.environ
        told = post(store, who, error, came=False)
        while told and holds and store.add("ended", 0) < size:
            waited = time.monotonic() - begun
            if waited > PATIENCE:
                return
            if waited > CONNECTS_WITHIN and not said:
                print(f"waiting to tell the others, at most {PATIENCE:g} s", file=sys.stderr)
                said = True
            time.sleep(0.1)

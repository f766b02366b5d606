"""The ranks of a run meet in a store: they compare what they are to do, and name who is lost."""

import hashlib
import json
import logging
import os
import platform
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.cluster import number
from sam_lightning.config.conf import flat
from sam_lightning.config.errors import ConfigError, TrainingError, one_line
from sam_lightning.config.text import clean
from sam_lightning.runs.parts import ALWAYS, when
from sam_lightning.runs.record import PACKAGES
from sam_lightning.runs.secrets import without_secrets

log = logging.getLogger(__name__)

# What gloo says, and the store before gloo is connected.
TIMEOUTS = re.compile("(?i)timed out|timeout")
LOST = re.compile("gloo/transport|Gloo connect|Timed out waiting|Wait timeout|Timeout waiting")
NOTICED_WITHIN = 5.0  # seconds until every living rank has noticed that one does not answer
PATIENCE = 60.0  # seconds that a rank which fails waits for those that are still starting
SAID_AFTER = 20.0  # seconds of waiting


class Ranks:
    """The processes of a run, as one of them sees them.

    Args:
        trainer: has ``timeout``, the seconds that they wait for each other.
        store: where they meet; None: where torchrun or SLURM says.

    Raises:
        ConfigError: the launcher does not say.
        TrainingError: the host with the store cannot be reached.
    """

    now: "Ranks | None" = None  # those of this process, while they are connected
    begun = False  # whether this process has come, or has tried to

    def __init__(self, trainer: DictConfig, store: dist.Store | None = None) -> None:
        self.timeout = float(trainer.get("timeout", 1800))
        self.hosts: list[str] = []  # by rank, once all have come
        self.hosts_store = False  # whether the store is in this process
        self.place: tuple[str, int] | None = None  # of the store, if it is on a network
        self._agreed = 0
        if store is None and "WORLD_SIZE" not in os.environ:
            slurm = SLURMEnvironment()
            # Reading them sets MASTER_ADDR and MASTER_PORT.
            log.debug("rank 0 is at %s:%d", slurm.main_address, slurm.main_port)
            self.rank, self.size = slurm.global_rank(), slurm.world_size()
        else:
            self.rank, self.size = number("RANK", 0), number("WORLD_SIZE", 1)
        self.store = store or self._connect()
        self.store.set_timeout(timedelta(seconds=self.timeout))

    def _connect(self) -> dist.Store:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ConfigError(
                    f"{name}: is not set on {socket.gethostname()}; the {self.size} processes meet "
                    "at MASTER_ADDR and MASTER_PORT, which torchrun sets"
                )
        host, port = os.environ["MASTER_ADDR"], number("MASTER_PORT", 0)
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has it
        self.hosts_store = self.rank == 0 and not agent
        self.place = host, port
        wait, ours = timedelta(seconds=self.timeout / 2), self.hosts_store  # it tries twice
        try:
            store = dist.TCPStore(
                host, port, self.size, ours, wait, wait_for_workers=False, multi_tenant=True
            )
        except dist.DistError as error:
            raise TrainingError(
                f"MASTER_ADDR={host}, MASTER_PORT={port}: rank {self.rank} on "
                f"{socket.gethostname()} cannot meet the others there ({_first_line(error)})"
            ) from error
        return dist.PrefixStore(f"attempt {number('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def come(self, gloo: bool) -> None:
        """Wait until all have come.

        Raises:
            ConfigError: another process has this rank, or another failed; or with ``gloo`` a host's
                name leads to where no other host can reach it.
            TrainingError: names those that have not come in time.
        """
        if self.store.add(f"rank {self.rank}", 1) > 1:
            other = self.store.get(f"come {self.rank}").decode()
            raise ConfigError(
                f"RANK={self.rank}: on {socket.gethostname()}, and {json.loads(other)[0]} has it "
                "too; every process needs its own"
            )
        came = [socket.gethostname(), _unreachable() if gloo else ""]
        found = [json.loads(text) for text in self._gather("come", json.dumps(came))]
        self.hosts = [host for host, _ in found]
        for host, address in found:
            if address and len({*self.hosts}) > 1:
                raise ConfigError(
                    f"GLOO_SOCKET_IFNAME: is not set on {host}, whose own name leads to {address}, "
                    "where no other host can reach it; set it on every host to the interface "
                    "between them, such as eth0"
                )

    def agree(self, about: Mapping[str, Any]) -> None:
        """Wait until all have said something, by name.

        Raises:
            ConfigError: names the first that differs.
        """
        self._agreed += 1
        name = f"agreed {self._agreed}"
        text = json.dumps(about, sort_keys=True, default=str)
        self.store.set(f"{name} whole {self.rank}", text)
        digests = self._gather(name, hashlib.sha256(text.encode()).hexdigest())
        for rank, digest in enumerate(digests):
            if digest == digests[0]:
                continue
            both = [json.loads(self.store.get(f"{name} whole {r}")) for r in (0, rank)]
            self._gather(f"{name} read", "")  # else the store could be gone by then
            key = min(k for k in {**both[0], **both[1]} if both[0].get(k) != both[1].get(k))
            mine, other = (clean(of.get(key))[:100] for of in both)
            raise ConfigError(
                f"{key}: is {mine} on {self._name(0)}, but {other} on {self._name(rank)}; it must "
                "be the same on all"
            )

    def _gather(self, name: str, mine: str) -> list[str]:
        """What all have given under this name, by rank."""
        self.store.set(f"{name} {self.rank}", mine)
        begun, said = time.monotonic(), False
        self.store.add(name, 1)
        while self.store.add(name, 0) < self.size:
            if self.store.check(["failed"]):
                raise self._failure()
            waited = time.monotonic() - begun
            if waited > (self.timeout if said else SAID_AFTER):
                missing = [r for r in range(self.size) if not self.store.check([f"{name} {r}"])]
                names = " and ".join(map(self._name, missing[:8]))
                if waited > self.timeout:
                    raise TrainingError(
                        f"{names} of {self.size} did not come to {socket.gethostname()} within "
                        f"trainer.timeout={self.timeout:g} s"
                    )
                log.warning("waiting for %s, at most trainer.timeout=%g s", names, self.timeout)
                said = True
            time.sleep(0.1)
        return [text.decode() for text in self.store.multi_get(self._keys(name))]

    def _keys(self, name: str) -> list[str]:
        return [f"{name} {rank}" for rank in range(self.size)]

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}" if self.hosts else f"rank {rank}"

    def tell(self, error: BaseException) -> None:
        """Let the others know why this rank ends, if it is the first to."""
        text = f"rank {self.rank} on {socket.gethostname()}: {without_secrets(one_line(error))}"
        told = json.dumps([isinstance(error, ConfigError), text])
        if self._answers():
            with suppress(RuntimeError):
                self.store.compare_set("failed", "", told)
                self.store.add("ended", 1)

    def _answers(self) -> bool:
        """Whether the store can be reached; else it would block for a quarter of an hour."""
        if self.place is None:
            return True
        try:
            socket.create_connection(self.place, NOTICED_WITHIN).close()
        except OSError:
            return False
        return True

    def _failure(self) -> Exception:
        of_settings, text = json.loads(self.store.get("failed"))
        return (ConfigError if of_settings else TrainingError)(text)

    def lost(self, error: BaseException) -> Exception:
        """What an error of a connection means: who does not answer, or how another rank failed."""
        silent = self._beside(0)  # the store is there
        if self._answers():
            with suppress(RuntimeError):
                if self.store.check(["failed"]):
                    return self._failure()
                self.store.set(f"waits {self.rank}", "")
                time.sleep(NOTICED_WITHIN)
                waits = enumerate(self._keys("waits"))
                silent = [rank for rank, key in waits if not self.store.check([key])]
        how = "has ended, or is cut off"
        if TIMEOUTS.search(str(error)):
            how = f"has not answered within trainer.timeout={self.timeout:g} s"
        if not silent:
            how = how.replace("has not answered", "the ranks have not reached each other")
        return TrainingError(f"{' and '.join(map(self._name, silent[:8]))} {how}".strip())

    def _beside(self, rank: int) -> list[int]:
        """The ranks on the same host."""
        return [r for r, host in enumerate(self.hosts) if host == self.hosts[rank]] or [rank]


@contextmanager
def connected(trainer: DictConfig, store: dist.Store | None = None) -> Iterator[None]:
    """Connect the processes in the block before Lightning does, because one prepares the data.

    They wait for each other at most ``trainer.timeout`` seconds. Those that a launcher has started
    meet where it says; the others in ``store``, and are on one machine. If one of them fails, so do
    all, with an error that says which.

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
                ranks.come(gloo=not cuda)
                ranks.agree(_versions())
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
        local = number("LOCAL_RANK", number("SLURM_LOCALID", 0))
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
        of_torch = isinstance(error, dist.DistError) or LOST.search(str(error))
        if Ranks.now is None or isinstance(error, TrainingError) or not of_torch:
            raise
        raise Ranks.now.lost(error) from error


def agree(about: Mapping[str, Any]) -> None:
    """Compare something, by name, over all processes that a launcher has started.

    Raises:
        ConfigError: names the first that differs, and two hosts where it does.
    """
    if Ranks.now is not None and Ranks.now.hosts:
        Ranks.now.agree(about)


def agree_on_settings(cfg: DictConfig) -> None:
    """Compare the settings, but for those that each host may have its own of."""
    here: Any = OmegaConf.to_container(
        OmegaConf.merge(cfg, {"output_dir": "OUTPUT_DIR", "ckpt_path": None}), resolve=True
    )
    agree({key: v for key, v in flat(without_secrets(here)).items() if not _is_own(key, v)})


def _is_own(key: str, value: Any) -> bool:
    reads = key.startswith("data.") and when(key) == ALWAYS and key != "data.eval_batch_size"
    return reads or key == "traceback" or isinstance(value, dict)


def _versions() -> dict[str, str]:
    code, root = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        code.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    found = {f"version of {name}": version(name) for name in PACKAGES}
    found["version of python"] = platform.python_version()
    return {**found, "code of sam_lightning": code.hexdigest()[:12]}


def _unreachable() -> str:
    """Where gloo would listen, if no other host can reach that, or nothing."""
    host, chosen = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        there = [name for _, name in socket.if_nameindex()]
        if missing := [name for name in chosen.split(",") if name not in there]:
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME={chosen}: there is no {missing[0]} on {host}, but "
                f"{', '.join(there)}"
            )
        return ""
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return "no address"
    return address if ip_address(address.partition("%")[0]).is_loopback else ""


def _first_line(error: BaseException) -> str:
    return clean(str(error).partition("\n")[0])


def tell(error: BaseException) -> None:
    """Let the other processes that torchrun has started know why this one does not come."""
    if Ranks.begun:  # they know
        return
    with suppress(ConfigError, RuntimeError):
        ranks = Ranks(OmegaConf.create({"timeout": PATIENCE}))
        ranks.tell(error)
        end = time.monotonic() + PATIENCE
        # The store may end with this process.
        while ranks.store.add("ended", 0) < ranks.size and time.monotonic() < end:
            time.sleep(0.1)

"""The ranks of a run meet in a store: they compare what they are to do, and name who is lost."""

import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from omegaconf import DictConfig

from sam_lightning.config.cluster import as_torchrun, number
from sam_lightning.config.errors import ConfigError, TrainingError, one_line
from sam_lightning.config.text import clean
from sam_lightning.runs.secrets import without_secrets
from sam_lightning.training.store import (
    CONNECTS_WITHIN,
    SAID_AFTER,
    Place,
    in_time,
    is_ours,
    meeting_place,
    open_store,
    why_not,
)

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUTS = re.compile("(?i)timed out|timeout")  # what gloo says
NOTICED_WITHIN = 5.0  # seconds until every living rank has noticed that one does not answer
COMPLETE = "complete"  # the key that is there once all ranks have met
GLOO = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # Linux: the address of an interface


class Ranks:
    """The processes of a run, as one of them sees them.

    Args:
        trainer: has ``timeout``, the seconds that they wait for each other.
        store: where they meet; None: where torchrun, SLURM or the user says.

    Raises:
        ConfigError: the launcher does not say.
        TrainingError: the host with the store cannot be reached.
    """

    now: "Ranks | None" = None  # those of this process, while they are connected
    begun = False  # whether this process has come, or has tried to

    def __init__(self, trainer: DictConfig, store: dist.Store | None = None) -> None:
        self.timeout = float(trainer.get("timeout", 1800))
        self.hosts: list[str] = []  # by rank, once all have come
        self.nodes: list[int] = []  # by rank: hosts may share a name
        self.hosts_store = False  # whether the store is in this process
        self.place: Place | None = None  # of the store, if it is on a network
        self._agreed = 0
        as_torchrun()
        self.rank, self.size = number("RANK", 0), number("WORLD_SIZE", 1)
        self.node = number("GROUP_RANK", self.rank - number("LOCAL_RANK", 0))
        if store is None:
            self.place, self.hosts_store = meeting_place(), is_ours(self.rank)
            store = open_store(self.place, self.hosts_store, self.timeout)
        self.store = store
        self.store.set_timeout(timedelta(seconds=self.timeout))

    def come(self) -> None:
        """Wait until all have come.

        Raises:
            ConfigError: another run meets there, another process has this rank or knows of another
                number of them, or another failed.
            TrainingError: names those that have not come in time.
        """
        if self.place is not None and self._ask(self.store.check, [COMPLETE]):
            raise ConfigError(
                f"MASTER_ADDR={self.place[0]}, MASTER_PORT={self.place[1]}: another run has met "
                "there; give this one another port, or a torchrun of its own"
            )
        size = self._ask(self.store.compare_set, "size", "", str(self.size)).decode()
        if size != str(self.size):
            raise ConfigError(
                f"trainer.devices, trainer.num_nodes: make {self.size} processes on "
                f"{socket.gethostname()}, but {size} on another host; they must be the same on all"
            )
        if self._ask(self.store.add, f"rank {self.rank}", 1) > 1:
            other = self._ask(self.store.get, f"come {self.rank}").decode()
            raise ConfigError(
                f"RANK={self.rank}: on {socket.gethostname()}, and {json.loads(other)[0]} has it "
                "too; each needs its own, by another NODE_RANK on every host"
            )
        came = json.dumps([socket.gethostname(), self.node])
        found = [json.loads(text) for text in self._gather("come", came)]
        self.hosts, self.nodes = [host for host, _ in found], [node for _, node in found]
        self._ask(self.store.set, COMPLETE, "")

    def reach_each_other(self) -> None:
        """Let the first rank of each host connect to those of the others, as gloo will.

        Raises:
            ConfigError: a host does not reach another.
        """
        if len({*self.nodes}) == 1:
            return
        firsts = [self.nodes.index(node) for node in sorted({*self.nodes})]
        with _listener() if self.rank in firsts else nullcontext() as listener:
            listens = json.dumps(listener and listener.getsockname()[:2])
            places = [json.loads(text) for text in self._gather("listens", listens)]
            others = [r for r in firsts if self.rank in firsts and r != self.rank]
            missed = [r for r in others if places[r] and why_not(tuple(places[r]))]
            missed_by = [json.loads(text) for text in self._gather("missed", json.dumps(missed))]
        for rank, missed in enumerate(missed_by):
            for other in missed[:1]:
                raise ConfigError(
                    f"{GLOO}: {self._name(rank)} does not reach {self._name(other)} at "
                    f"{places[other][0]}, where gloo would listen; set it on every host to the "
                    "interface between them, such as eth0, and let firewalls pass all its ports"
                )

    def agree(self, about: Mapping[str, Any]) -> None:
        """Wait until all have said something, by name.

        Raises:
            ConfigError: names the first that differs.
        """
        self._agreed += 1
        name = f"agreed {self._agreed}"
        text = json.dumps(about, sort_keys=True, default=str)
        self._ask(self.store.set, f"{name} whole {self.rank}", text)
        digests = self._gather(name, hashlib.sha256(text.encode()).hexdigest())
        for rank, digest in enumerate(digests):
            if digest == digests[0]:
                continue
            wholes = [self._ask(self.store.get, f"{name} whole {r}") for r in (0, rank)]
            both = [json.loads(whole) for whole in wholes]
            self._gather(f"{name} read", "")  # else the store could be gone by then
            key = min(k for k in {**both[0], **both[1]} if both[0].get(k) != both[1].get(k))
            mine, other = (clean(of.get(key))[:100] for of in both)
            raise ConfigError(
                f"{key}: is {mine} on {self._name(0)}, but {other} on {self._name(rank)}; it must "
                "be the same on all"
            )

    def _gather(self, name: str, mine: str) -> list[str]:
        """What all have given under this name, by rank."""
        begun, said = time.monotonic(), False
        self._ask(self.store.set, f"{name} {self.rank}", mine)
        self._ask(self.store.add, name, 1)
        while self._ask(self.store.add, name, 0) < self.size:
            if self._ask(self.store.check, ["failed"]):
                raise self._failure()
            waited = time.monotonic() - begun
            if waited > (self.timeout if said else SAID_AFTER):
                keys = enumerate(self._keys(name))
                missing = [rank for rank, key in keys if not self._ask(self.store.check, [key])]
                names = " and ".join(map(self._name, missing[:8]))
                if waited > self.timeout:
                    raise TrainingError(
                        f"{names} of {self.size} did not come to {socket.gethostname()} within "
                        f"trainer.timeout={self.timeout:g} s"
                    )
                log.warning("waiting for %s, at most trainer.timeout=%g s", names, self.timeout)
                said = True
            time.sleep(0.1)
        texts = self._ask(self.store.multi_get, self._keys(name))
        return [text.decode() for text in texts]

    def _ask(self, ask: Callable[P, T], *about: P.args, **named: P.kwargs) -> T:
        """What the store answers, or a TrainingError."""
        try:
            return in_time(partial(ask, *about, **named), self.timeout)
        except TimeoutError as error:
            raise TrainingError(
                f"{self._name(0)} has not answered within trainer.timeout={self.timeout:g} s"
            ) from error

    def _keys(self, name: str) -> list[str]:
        return [f"{name} {rank}" for rank in range(self.size)]

    def _name(self, rank: int) -> str:
        host = self.hosts[rank] if self.hosts else socket.gethostname()
        known = self.hosts or rank == self.rank
        return f"rank {rank} on {host}" if known else f"rank {rank}"

    def tell(self, error: BaseException) -> None:
        """Let the others know why this rank ends, if it is the first to."""
        post(self.store, self._name(self.rank), error, came=bool(self.hosts))

    def _failure(self) -> Exception:
        of_settings, text = json.loads(self.store.get("failed"))
        return (ConfigError if of_settings else TrainingError)(text)

    def lost(self, error: BaseException) -> Exception:
        """What an error of a connection means: who does not answer, or how another rank failed."""
        # The store is beside rank 0.
        first = [r for r, node in enumerate(self.nodes) if node == self.nodes[0]]
        silent = [r for r in first if r != self.rank] or [0]
        with suppress(RuntimeError, TimeoutError):
            heard = in_time(self._hear, NOTICED_WITHIN + CONNECTS_WITHIN)
            if isinstance(heard, Exception):
                return heard
            silent = heard
        how = "has ended, or is cut off"
        if TIMEOUTS.search(str(error)):
            how = f"has not answered within trainer.timeout={self.timeout:g} s"
        if not silent:
            how = how.replace("has not answered", "the ranks have not reached each other")
        return TrainingError(f"{' and '.join(map(self._name, silent[:8]))} {how}".strip())

    def _hear(self) -> list[int] | Exception:
        """The ranks that are silent, or how one failed."""
        if self.store.check(["failed"]):
            return self._failure()
        self.store.set(f"waits {self.rank}", "")
        time.sleep(NOTICED_WITHIN)
        waits = enumerate(self._keys("waits"))
        return [rank for rank, key in waits if not self.store.check([key])]


def post(store: dist.Store, who: str, error: BaseException, came: bool) -> bool:
    """Leave in the store why one ends, unless another has ended before.

    Args:
        came: whether it has met the others. If not, a store where all have is of another run.

    Returns:
        whether the store is of this run, and answers.
    """
    told = json.dumps(
        [isinstance(error, ConfigError), f"{who}: {without_secrets(one_line(error))}"]
    )

    def leave() -> bool:
        ours = came or not store.check([COMPLETE])
        if ours:
            store.compare_set("failed", "", told)
            store.add("ended", 1)
        return ours

    with suppress(RuntimeError, TimeoutError):
        return in_time(leave, CONNECTS_WITHIN)
    return False


@contextmanager
def _listener() -> Iterator[socket.socket | None]:
    """A socket that listens where gloo does on this host, or None if that is not known.

    Raises:
        ConfigError: ``GLOO_SOCKET_IFNAME`` is no interface here.
    """
    address = socket.gethostname()
    if chosen := os.environ.get(GLOO):
        there = [name for _, name in socket.if_nameindex()]
        if missing := [name for name in chosen.split(",") if name not in there]:
            raise ConfigError(
                f"{GLOO}={chosen}: there is no {missing[0]} on {address}, but {', '.join(there)}"
            )
        try:
            address = _address_of(chosen.partition(",")[0])
        except OSError:  # as of an interface with IPv6 alone
            yield None
            return
    with _served(address) as listener:
        yield listener


def _served(address: str) -> socket.socket:
    with suppress(OSError):
        for family, _, _, _, place in socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM):
            with suppress(OSError):
                return socket.create_server(place[:2], family=family)
    return socket.create_server(("127.0.0.1", 0))  # which gloo turns to by itself


def _address_of(interface: str) -> str:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        return socket.inet_ntoa(fcntl.ioctl(any_socket, SIOCGIFADDR, request)[20:24])

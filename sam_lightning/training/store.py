"""The store in which ranks meet: a host of the network, which may be silent or something else."""

import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

import torch.distributed as dist

from sam_lightning.config.cluster import number
from sam_lightning.config.errors import ConfigError, TrainingError
from sam_lightning.config.text import clean

log = logging.getLogger(__name__)

T = TypeVar("T")
Place = tuple[str, int]  # an address, and a port

CONNECTS_WITHIN = 5.0  # seconds
SAID_AFTER = 20.0  # seconds of waiting


def meeting_place() -> Place:
    """What ``MASTER_ADDR`` and ``MASTER_PORT`` say.

    Raises:
        ConfigError: one of them is not set, or is no port.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(
                f"{name}: is not set on {socket.gethostname()}; the processes meet at MASTER_ADDR "
                "and MASTER_PORT, which are the same for all"
            )
    if (port := number("MASTER_PORT", 0)) not in range(1, 1 << 16):
        raise ConfigError(f"MASTER_PORT={port}: must be from 1 to 65535")
    return os.environ["MASTER_ADDR"], port


def is_ours(rank: int) -> bool:
    """Whether the store is in the process of this rank; torchrun has one of its own."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def open_store(place: Place, ours: bool, timeout: float) -> dist.Store:
    """The store at a place: in this process if it is ``ours``, else one that may come later.

    Raises:
        TrainingError: nothing answers there within ``timeout`` seconds, or it is no store.
    """
    wait = timedelta(seconds=timeout)
    try:
        if not ours:
            _wait_for(place, timeout)
        store = in_time(  # something else may listen there, and never answer
            lambda: dist.TCPStore(
                *place, None, ours, wait, wait_for_workers=False, multi_tenant=True
            ),
            timeout,
        )
    except (dist.DistError, OSError, ValueError) as error:  # UnicodeError, of an odd name
        reason = clean(str(error).partition("\n")[0]) or "no store answers there"
        raise TrainingError(
            f"MASTER_ADDR={place[0]}, MASTER_PORT={place[1]}: {socket.gethostname()} cannot meet "
            f"the others there ({reason})"
        ) from error
    return dist.PrefixStore(f"attempt {number('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _wait_for(place: Place, timeout: float) -> None:
    begun, said = time.monotonic(), False
    while error := why_not(place):
        waited = time.monotonic() - begun
        if waited > timeout:
            raise error
        if waited > SAID_AFTER and not said:
            at = f"MASTER_ADDR={place[0]}, MASTER_PORT={place[1]}"
            log.warning("waiting for %s, at most %g s", at, timeout)
            said = True
        time.sleep(0.5)


def why_not(place: Place) -> OSError | None:
    """Why nothing can be reached there, or None. By itself TCP waits minutes for an answer."""
    try:
        socket.create_connection(place, CONNECTS_WITHIN).close()
    except OSError as error:
        return error
    return None


def in_time(ask: Callable[[], T], seconds: float) -> T:
    """What a store answers. Behind a cable that is cut, TCP waits for a quarter of an hour.

    Raises:
        TimeoutError: it has not answered in time.
    """
    answers: SimpleQueue[tuple[T | None, Exception | None]] = SimpleQueue()

    def wait() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    Thread(target=wait, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]

"""A function in two processes that gloo connects, forks of one that has imported torch."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from inject import SERVER

RANKS = 2


def run_ranks(program: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Call ``program(folder, *arguments)`` on both; each has to end within 200 seconds."""
    given = program, folder, *arguments
    processes = [SERVER.Process(target=_rank, args=(rank, *given)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        if process.is_alive():
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0] * RANKS


def _rank(rank: int, program: Callable[..., None], folder: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ["TORCHELASTIC_RUN_ID"] = "tests"  # as torchrun does
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    program(folder, *arguments)
    dist.destroy_process_group()

"""Checkpoints as files: whole when they are there, checked when they are read, and only data."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from sam_lightning.errors import ConfigError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames, so that a checkpoint is the old one or the new one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save on local disk; on an error, such as a full disk, the file that was there stays."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            torch.save(checkpoint, temporary)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def read(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint of a run onto the CPU, after comparing its bytes with their checksums.

    Only tensors and plain values are loaded (``weights_only``), so a file cannot run code.

    Raises:
        ConfigError: the file is not there, is damaged, or is not a checkpoint of a run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ConfigError(f"ckpt_path={path}: is damaged ({damaged} is not what was saved)")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        checkpoint["state_dict"], checkpoint["global_step"], checkpoint["hyper_parameters"]["model"]
    except ConfigError:
        raise
    except Exception as error:  # zip, pickle and torch each fail in their own ways
        if not Path(path).is_file():
            raise ConfigError(f"ckpt_path={path}: no such file") from error
        raise ConfigError(
            f"ckpt_path={path}: not a readable checkpoint of a run ({type(error).__name__})"
        ) from error
    return checkpoint

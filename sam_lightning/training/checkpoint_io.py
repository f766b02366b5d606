"""How Lightning saves and removes checkpoints here: atomically, and in the run's folders only."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from sam_lightning.runs.checkpoint import read, write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves with ``runs.checkpoint.write``."""

    def __init__(self) -> None:
        super().__init__()
        self._folders: set[Path] = set()  # that this run has saved to

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save on local disk; an error, such as a full disk, leaves the old file as it is."""
        file = Path(path)
        write(file, checkpoint)
        self._folders.add(file.parent.resolve())

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load onto the CPU, and as strictly as everywhere."""
        return read(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint only from a folder that this run has saved to.

        The path may come from a resumed checkpoint, and so from a stranger.
        """
        file = Path(path)
        if file.suffix == ".ckpt" and file.parent.resolve() in self._folders:
            file.unlink(missing_ok=True)

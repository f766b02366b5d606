"""``ImageData`` for a ``Trainer``, which says which process and epoch this is."""

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.accelerators import CUDAAccelerator
from torch import Tensor
from torch.utils.data import DataLoader

from sam_lightning.data.image_data import ImageData
from sam_lightning.data.loading import TrainLoader


class ImageDataModule(ImageData, LightningDataModule):
    """``ImageData`` as a ``LightningDataModule``; ``setup`` sets its attributes."""

    def prepare_data(self) -> None:
        """Read the source in one process per node, so that it downloads and fills its caches."""
        if self._augment is None:
            self.read()

    def setup(self, stage: str | None = None) -> None:
        """Read the source and split it, once, whatever the stages; then move it to ``device``."""
        world_size, _ = self._world()
        if self.batch_size % world_size:
            raise ValueError(
                f"batch_size={self.batch_size}: must be a multiple of the {world_size} "
                "processes that share a batch"
            )
        if self._augment is None:
            self.read()
        if self.device is None or self.trainer is None:
            return
        device = self.trainer.strategy.root_device
        if device.type != self.device:
            raise ValueError(
                f"device={self.device}: the trainer trains on {device.type}; set device to that "
                "or to null"
            )
        if device.type != "cpu":
            for split in (self.train, self.val, self.test if "test" in self.pixels_of else None):
                if split is not None and not isinstance(split.stored, Tensor):
                    raise ValueError(
                        f"device={self.device}: images are decoded each time they are needed (by "
                        "data.view or data.memory_gb), so they cannot be kept there; set it to null"
                    )
        self.train = self.train.to(device)
        self.val = None if self.val is None else self.val.to(device)
        if self.test is not None and "test" in self.pixels_of:
            self.test = self.test.to(device)

    @property
    def steps_per_epoch(self) -> int:
        """Training batches of one process in one epoch."""
        return len(self.train_dataloader())

    @property
    def largest_batch(self) -> int:
        """Images in each training batch of one process, except an epoch's last."""
        world_size, _ = self._world()
        share = len(self.train_dataloader().sampler)  # type: ignore[arg-type]
        return min(self.batch_size // world_size, share)

    def train_dataloader(self) -> TrainLoader:
        """This process's share of the training set, in an order that (seed, epoch) fixes."""
        # Lightning sets the epoch too, but in a resumed run only after workers took their first
        # indices from the sampler.
        epoch = 0 if self.trainer is None else _epoch(self.trainer)
        loader = self.train_loader(*self._world(), epoch, self._pin_memory())
        loader.done = self._batches_done
        return loader

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | list[Any]:
        """This process's share of the validation set, in order; an empty list without one."""
        if self.val is None:
            return []
        return self.eval_loader(self.val, *self._world(), self._pin_memory())

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """This process's share of the test set, in order."""
        assert self.test is not None
        return self.eval_loader(self.test, *self._world(), self._pin_memory())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Any]:
        """Augment a training batch, as far as its loader has not, and normalise any other.

        Returns (images, labels); mixed images have ``MixedLabels``.
        """
        images, labels, *key = batch
        return self.finish(images, labels, *key) if key else (self.normalize(images), labels)

    def _batches_done(self) -> int:
        """Batches of this epoch that were fetched for training, also where it was resumed."""
        # The count is saved and restored with the loop, whatever the loader has fetched in advance.
        ready: int = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready  # type: ignore[union-attr]
        return ready

    def _processes(self) -> int:
        nodes: int = getattr(self.trainer, "num_nodes", 1)
        return self._world()[0] // nodes

    def _pin_memory(self) -> bool:
        accelerator = getattr(self.trainer, "accelerator", None)
        return isinstance(accelerator, CUDAAccelerator) and self.device is None

    def _world(self) -> tuple[int, int]:
        """Number of processes, and this one's rank."""
        trainer = self.trainer
        return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)


def _epoch(trainer: Any) -> int | None:
    """The running or the next epoch; ``trainer.current_epoch`` lags behind it in a resumed run.

    None: all are as the first one, as ``overfit_batches`` says.
    """
    epoch: int = trainer.fit_loop.epoch_progress.current.processed
    return None if trainer.overfit_batches else epoch

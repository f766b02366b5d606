"""Lightning's loops over epochs and batches, continued exactly where a checkpoint was saved.

Lightning tells from several counters where a run was. With ``max_steps`` it counts an epoch twice,
and it forgets that early stopping has ended the run and that training was not ended yet.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loops import _FitLoop, _Loop, _TrainingEpochLoop
from lightning.pytorch.loops.fetchers import _DataFetcher

from sam_lightning.training.callbacks.last_checkpoint import LastCheckpoint


class EpochLoop(_TrainingEpochLoop):
    """Tells ``LastCheckpoint`` when all that belongs to a batch is done, its validation too."""

    continues = False  # whether the next epoch is one that a checkpoint was saved in

    def reset(self) -> None:
        """Start to count the batches of an epoch, or count on where the checkpoint was."""
        if not self.continues:
            super().reset()
        self.continues = False

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate if it is time to; then the run may save and stop, unless the epoch ends."""
        super().on_advance_end(data_fetcher)
        if not self.done:
            for saver in self._savers():
                saver.on_batch_done(self.trainer)

    def _broadcast_sigterm_tensor(self) -> None:
        # Lightning's way to stop all processes: a message before each batch, and a wait for it.
        if not self._savers():
            super()._broadcast_sigterm_tensor()

    def _savers(self) -> list[LastCheckpoint]:
        trainer: Any = self.trainer
        return [c for c in trainer.callbacks if isinstance(c, LastCheckpoint)]


class FitLoop(_FitLoop):
    """Takes the place of ``trainer.fit_loop``.

    Args:
        trainer: its limits of epochs and steps are taken over.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        limits = trainer.fit_loop
        super().__init__(trainer, limits.min_epochs, limits.max_epochs)
        self.epoch_loop: EpochLoop = EpochLoop(trainer, limits.min_steps, limits.max_steps)

    def run(self) -> None:
        """Train; a run that was saved when it was trained only calls the hooks of its end."""
        if self.is_resuming:
            self.setup_data()
            if self.skip:
                self.on_run_start()
                self.on_run_end()
                return
        super().run()

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Add whether a callback has ended the training; ``max_time`` decides that again."""
        trainer: Any = self.trainer
        timers = [c for c in trainer.callbacks if isinstance(c, Timer)]
        in_time = all((timer.time_remaining() or 1) > 0 for timer in timers)
        return {**super().on_save_checkpoint(), "should_stop": trainer.should_stop and in_time}

    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        """Continue with the next epoch, or within one behind its last whole step.

        A checkpoint has to be either between two epochs or between two batches: what a callback
        saves in the middle counts as the next such place.
        """
        super().load_state_dict(state_dict, prefix)
        self.trainer.should_stop |= state_dict[f"{prefix}state_dict"].get("should_stop", False)
        epochs: Any = self.epoch_progress
        batches: Any = self.epoch_loop.batch_progress
        within = epochs.current.ready > epochs.current.processed
        for epoch in (epochs.total, epochs.current):
            epoch.completed = epoch.processed
        _Loop.restarting.fset(self, False)  # type: ignore[attr-defined]
        if not within:
            batches.reset_on_run()
            self._combined_loader_states_to_load = []
            return
        self._restarting = self.epoch_loop.continues = True
        # Batches that wait for others to make a step have had no pass yet.
        module: Any = self.trainer.lightning_module
        done = batches.current.processed
        if not batches.is_last_batch:
            done -= done % getattr(module, "accumulate_grad_batches", 1)
        repeated = batches.current.ready - done
        for batch in (batches.total, batches.current):
            batch.ready -= repeated
            batch.started = batch.processed = batch.completed = batch.ready
        self._combined_loader_states_to_load = [{"batches": done}]

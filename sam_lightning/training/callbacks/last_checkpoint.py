"""Saves a run after every epoch, every n steps, and when it is told to stop."""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint

from sam_lightning.config.errors import Interrupted
from sam_lightning.config.text import clean
from sam_lightning.training.callbacks.progress import MetricsCSV
from sam_lightning.training.ranks import Ranks

log = logging.getLogger(__name__)


class StopSignal:
    """Saves and stops at SIGINT, SIGTERM and, under SLURM, SIGUSR1.

    Training first finishes the present step, so a checkpoint never has perturbed weights. Outside
    of training, and on a second signal, the process stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False  # whether training will look at ``received`` soon
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Handle the signals here, also if other code has set a handler since."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers in the main thread only
        slurm = [signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else []
        for signum in (signal.SIGINT, signal.SIGTERM, *slurm):
            self._before.setdefault(signum, signal.signal(signum, self._handle))

    __enter__ = listen

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def tell(self, signum: int) -> None:
        """Note the first signal, which this process or another one of the run has received."""
        if self.received is None:
            self.received, self._at = signum, time.monotonic()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # A terminal and a launcher may both pass on the same request.
        again = self.received is not None and time.monotonic() - self._at > 1
        self.tell(signum)
        if again or not self.deferred:
            raise Interrupted(signum)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a run continues as if it had never stopped.

    The one before it stays as ``previous.ckpt`` until the run is complete, in case the disk
    damages the last. Place it after other checkpoint callbacks, because it saves their state.

    Args:
        dirpath: the folder of both.
        every_n_steps: save after every n steps too; None: only after epochs.
    """

    def __init__(self, dirpath: str, every_n_steps: int | None = None) -> None:
        super().__init__()
        self.dirpath = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.stop = StopSignal()
        self._metrics: dict[str, Any] = {}  # of the checkpoint
        self._trainer: L.Trainer | None = None
        self._seen = -1
        self._where = ""  # which host of several was told to stop
        # Steps and seconds when several processes last agreed, and the step to do so next.
        self._agreed, self._next = (0, 0.0), 0

    def state_dict(self) -> dict[str, Any]:
        """The metrics as logged last, and how many rows of ``metrics.csv`` there are."""
        if self._trainer is None:
            return {"metrics": self._metrics}
        found = self._trainer.callback_metrics
        rows = [logger.rows for logger in self._trainer.loggers if isinstance(logger, MetricsCSV)]
        return {"metrics": {name: v.detach().cpu() for name, v in found.items()}, "rows": rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the metrics of the checkpoint."""
        self._metrics = state_dict["metrics"]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Fit the states of callbacks to this run's: where it is now, and what it was told now."""
        states = dict(checkpoint["callbacks"])
        for callback in trainer.callbacks:
            if not (state := states.pop(callback.state_key, None)):
                continue
            if isinstance(callback, EarlyStopping):  # it would load this argument
                state["patience"] = callback.patience
            if isinstance(callback, ModelCheckpoint) and state["dirpath"] != callback.dirpath:
                _move(state, Path(str(callback.dirpath)))
        for name in states if trainer.is_global_zero else ():
            log.warning("the state of %s is left out: this run has no such callback", clean(name))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen again: Lightning's handlers would end the run between two passes."""
        self.stop.listen()
        self.stop.deferred = True
        self._seen = trainer.global_step
        self._agreed, self._next = (trainer.global_step, time.monotonic()), 0
        self._trainer = trainer
        # What is not logged in every epoch is watched, and is a result, in those between too.
        trainer.callback_metrics.update({k: torch.as_tensor(v) for k, v in self._metrics.items()})

    def on_batch_done(self, trainer: L.Trainer) -> None:
        """Save if due, or told to stop; called between two batches, and heeded after a step."""
        if trainer.global_step == self._seen:  # this batch waits for others to make a step
            return
        self._seen = trainer.global_step
        stop = self._stop_agreed(trainer, trainer.global_step >= self._next)
        if stop or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self._save(trainer)
        if stop:
            self._leave(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the validation; stop if told to."""
        self._save(trainer)
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if self._stop_agreed(trainer, True) and not last:
            self._leave(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove ``previous.ckpt``: the weights are final."""
        self.stop.deferred = False
        if trainer.is_global_zero:
            (self.dirpath / "previous.ckpt").unlink(missing_ok=True)
        if self.stop.received is not None:
            raise Interrupted(self.stop.received, self._where)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen again, as at the start of training."""
        self.stop.listen()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop at once from now on."""
        self.stop.deferred = False

    def _stop_agreed(self, trainer: L.Trainer, ask: bool) -> bool:
        """Whether any process was told to stop.

        Several processes ask each other about once a second: to wait for the answer after each step
        would leave their devices idle. All of them know at which step they will ask again.
        """
        told = self.stop.received or 0
        if trainer.world_size == 1:
            return told > 0
        if not ask:
            return False
        (step, at), self._agreed = self._agreed, (trainer.global_step, time.monotonic())
        speed = (trainer.global_step - step) / max(self._agreed[1] - at, 1e-9)
        rank = trainer.global_rank if told else -1
        all_of = torch.tensor([told, max(speed, 1.0), rank], device=trainer.strategy.root_device)
        dist.all_reduce(all_of, dist.ReduceOp.MAX)
        told, steps, rank = map(int, all_of.tolist())
        self._next = trainer.global_step + steps
        if told:  # so that the process that queues the job again knows, told or not
            self.stop.tell(told)
            ranks = Ranks.now
            if ranks is not None and len({*ranks.nodes}) > 1:
                self._where = f" on {ranks.hosts[rank]}"
        return told > 0

    def _save(self, trainer: L.Trainer) -> None:
        self._seen = trainer.global_step
        new, last = self.dirpath / "new.ckpt", self.dirpath / "last.ckpt"
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            # A run killed between the two still has both, and continues from the newer.
            if last.exists():
                os.replace(last, self.dirpath / "previous.ckpt")
            os.replace(new, last)

    def _leave(self, trainer: L.Trainer) -> None:
        assert self.stop.received is not None
        stopped = Interrupted(self.stop.received, self._where)
        step = trainer.global_step
        if trainer.local_rank == 0:  # the others would say the same
            log.warning("%s after step %d; ckpt_path=last continues", stopped, step)
        raise stopped


def _move(state: dict[str, Any], folder: Path) -> None:
    """Let the state of a ``ModelCheckpoint`` name files in ``folder``; forget those not there."""
    former = Path(str(state["dirpath"]))

    def moved(path: str) -> str:
        file = Path(path)
        file = folder / (file.relative_to(former) if former in file.parents else file.name)
        return str(file) if path and file.is_file() else ""

    kept = {moved(path): score for path, score in state["best_k_models"].items()}
    if "" in kept or moved(state["best_model_path"]) == "":
        return  # Lightning begins to choose again
    names = ("best_model_path", "kth_best_model_path", "last_model_path")
    state.update({name: moved(state[name]) for name in names})
    state.update(best_k_models=kept, dirpath=str(folder))

"""Metrics that a run is told to watch, found missing before it trains."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig

from sam_lightning.config.errors import ConfigError, did_you_mean
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.training.build import planned_steps
from sam_lightning.training.callbacks.sharpness import MEASURED, SharpnessMonitor


def check_watched(cfg: DictConfig, trainer: Any, data: ImageDataModule) -> None:
    """Refuse a run that trains nothing, and metrics to watch that it will never have.

    A checkpoint that chooses by validation is left out of ``trainer`` if there is none.

    Raises:
        ConfigError: names the key, its value, and why the metric is missing.
    """
    for key in ("max_steps", "limit_train_batches"):
        if cfg.trainer.get(key) == 0:
            raise ConfigError(f"trainer.{key}=0: trains nothing; leave it out, or give more")
    kinds = ("loss", "acc", "error", *(["acc5"] if data.num_classes >= 10 else []))
    logged = ["train/loss", "train/acc", *(f"val/{kind}" for kind in kinds)]
    if any(isinstance(c, SharpnessMonitor) for c in trainer.callbacks):
        logged += MEASURED
    missing = _no_validation(cfg, trainer, data)
    if (metric := cfg.optimized_metric) is not None:
        _check("optimized_metric", metric, [*logged, *(f"test/{kind}" for kind in kinds)], missing)
        if metric.startswith("test/") and trainer.limit_test_batches == 0:
            raise ConfigError(f"optimized_metric={metric}: there is no test with no test batches")
    callbacks = {k: c for k, c in (cfg.get("callbacks") or {}).items() if c is not None}
    unknown = any(_may_log(str(callback.get("_target_"))) for callback in callbacks.values())
    for name, callback in callbacks.items():
        target, monitor = str(callback.get("_target_")), callback.get("monitor")
        if monitor is None or not target.startswith("lightning."):
            continue
        reason = None if target.endswith("Checkpoint") else missing
        _check(f"callbacks.{name}.monitor", monitor, [*logged, *[monitor] * unknown], reason)
    for callback in [*trainer.callbacks] if missing else []:
        by_validation = str(getattr(callback, "monitor", "")).startswith("val/")
        if isinstance(callback, Checkpoint) and by_validation:
            trainer.callbacks.remove(callback)


def _check(key: str, metric: str, logged: Sequence[str], no_validation: str | None) -> None:
    if metric not in logged:
        hint = did_you_mean(metric, logged) or f"; there are {', '.join(logged)}"
        raise ConfigError(f"{key}={metric}: this run has no such metric{hint}")
    if metric.startswith("val/") and no_validation:
        raise ConfigError(f"{key}={metric}: {no_validation}")


def _no_validation(cfg: DictConfig, trainer: Any, data: ImageDataModule) -> str | None:
    """Why a run will not validate; None if it will."""
    if data.val is None:
        return "there is no validation data; set data.val_size"
    if trainer.limit_val_batches == 0:
        return "there is no validation with no validation batches"
    every, (per_epoch, total) = trainer.check_val_every_n_epoch, planned_steps(cfg, data, trainer)
    within = trainer.fast_dev_run or trainer.val_check_interval != 1.0
    if not within and every and total < every * per_epoch:
        return f"the first validation is after {every * per_epoch} steps, and the run has {total}"
    return None


def _may_log(target: str) -> bool:
    """Whether a callback may log metrics that are not known here."""
    ours = target.startswith(("sam_lightning.", "lightning.pytorch.callbacks."))
    return not ours or target.endswith("LearningRateMonitor")

"""The parts of a run: what may change from one to the next, and what has changed.

A run that stops and continues has several parts. Each checkpoint has the settings of its part,
so a folder that was moved, or a single file, is enough to continue.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sam_lightning.config.conf import flat
from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.config.text import clean
from sam_lightning.runs.checkpoint import read
from sam_lightning.runs.old_names import DEFAULTS

ALWAYS, STEPS, EPOCHS, NEVER = "always", "steps", "epochs", "never"
MEANING = {
    ALWAYS: "at any time, also if only the test of a finished run is repeated",
    STEPS: "at any step",
    EPOCHS: "between two epochs, not within one",
    NEVER: "never: it is another run",
}
# The longest name that a key has, or that it lies below, counts.
TABLE = {
    ALWAYS: """
        output_dir ckpt_path task_name experiment sweep test debug traceback optimized_metric
        checkpoint_every_n_steps logger cuda_graph
        callbacks.best callbacks.last callbacks.summary callbacks.progress callbacks.dashboard
        callbacks.sharpness
        data.root data.cache_dir data.memory_gb data.cache_gb data.fetch_threads
        data.download data.num_workers data.device
        data.pin_memory data.eval_batch_size data.source.root data.source.cache_dir
        data.source.memory_gb data.source.cache_gb data.source.fetch_threads data.source.download
        data.source.expected
        trainer.accelerator trainer.devices trainer.num_nodes trainer.strategy trainer.timeout
        trainer.log_every_n_steps trainer.profiler trainer.benchmark trainer.detect_anomaly
        trainer.enable_progress_bar trainer.enable_model_summary
    """,
    STEPS: """
        epochs lr rho weight_decay label_smoothing max_skipped_steps threads compile memory_format
        loss method optimizer scheduler callbacks trainer
    """,
    EPOCHS: """
        augment seed batch_size data data.source.image_size data.source.skip_broken training_images
        data.source.view data.source.crop_scale data.source.crop_ratio data.source.crop_fraction
        data.source.interpolation data.source.crop_mode
        trainer.accumulate_grad_batches trainer.limit_train_batches trainer.overfit_batches
        trainer.max_steps
    """,
    NEVER: """
        classes model finetune param_groups optimizer._target_ data.val_size data.split_seed
        data.split data.source trainer.fast_dev_run trainer.barebones
    """,
}
_WHEN = {name: when for when, names in TABLE.items() for name in names.split()}
# Settings that are not compared with those of a checkpoint from before ``augment`` was a group.
BEFORE_AUGMENT = (
    *("augment.", "loss.", "data.sampler", "data.repeats", "data.flip"),
    *("data.crop_padding", "data.cutout", "data.policy"),
)
# What tells the data from others, under names that are no keys of the configuration.
OF_DATA = ("classes", "training_images")


def when(key: str) -> str:
    """When a setting may change between the parts of a run: a key of ``MEANING``.

    Keys that are not in ``TABLE`` never do.
    """
    while key and key not in _WHEN:
        key = key.rpartition(".")[0]
    return _WHEN.get(key, NEVER)


@dataclass(frozen=True)
class Position:
    """Where a run is: what is done of it.

    ``within`` is whether an epoch has begun and is not complete; ``stopped`` whether early stopping
    has ended the training.
    """

    step: int
    epochs: int
    within: bool
    stopped: bool

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Position":
        """Of a checkpoint, as ``checkpoint.read`` returns it.

        Raises:
            KeyError, TypeError: it does not say, or has weights only.
        """
        checkpoint["optimizer_states"], checkpoint["callbacks"]
        loop = checkpoint["loops"]["fit_loop"]
        epoch = loop["epoch_progress"]["current"]
        whole = loop["epoch_loop.batch_progress"]["is_last_batch"]
        within = epoch["ready"] > epoch["processed"] or not whole
        stopped = bool(loop["state_dict"].get("should_stop"))
        return cls(int(checkpoint["global_step"]), int(epoch["processed"]), within, stopped)

    def has_ended(self, settings: Mapping[str, Any]) -> bool:
        """Whether these settings leave nothing to train."""
        most = settings.get("trainer.max_steps")
        by_steps = most not in (None, -1) and self.step >= most
        return self.stopped or by_steps or self.epochs >= settings["epochs"]

    def refusal(self, key: str, ended: bool) -> str:
        """Where a setting may not change, if that is here, or nothing."""
        allowed = when(key)
        if allowed == NEVER:
            return "within a run"
        if ended and allowed != ALWAYS:
            return f"if nothing is left to train but the test to repeat ({self.epochs} epochs done)"
        if allowed == EPOCHS and self.within:
            return f"within an epoch, and the run stopped in epoch {self.epochs + 1}"
        return ""


def settings_of(config: Mapping[str, Any], classes: Iterable[str], labels: Any) -> dict[str, Any]:
    """The settings of a run and what tells its data from others, by key.

    Args:
        config: the whole configuration, resolved, as plain values.
        classes: the names of the data's classes.
        labels: those of all training images, in their order; an array with ``tobytes``.
    """
    folder = str(config["output_dir"])

    def settled(value: Any) -> Any:  # a run may move
        inside = isinstance(value, str) and value.startswith(folder)
        return f"${{output_dir}}{value[len(folder) :]}" if inside else value

    leaves = {k: settled(v) for k, v in flat(config).items() if not isinstance(v, dict)}
    digest = hashlib.blake2b(labels.tobytes(), digest_size=6).hexdigest()
    data = {"classes": [*map(str, classes)], "training_images": f"{len(labels)}, labels {digest}"}
    return {**leaves, **data, "ckpt_path": None}


def changes(path: str | None, settings: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The settings that count and differ from the checkpoint's, and whether only its test is left.

    Args:
        path: of the checkpoint to continue from; None: a new run.
        settings: those given now, from ``settings_of``.

    Raises:
        ConfigError: names a setting that may not change here, its value before, and the one now.
    """
    if path is None:
        return {}, False
    checkpoint = read(path, mmap=True)
    try:
        position, run = Position.of(checkpoint), checkpoint.get("settings")
        had = dict(run) if run else _settings_before(checkpoint["hyper_parameters"])
        json.dumps(had)  # plain values only
        had, settings = _spelled_out(had), _spelled_out(settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"no run can continue from it ({type(error).__name__}: {one_line(error)})"
        raise ConfigError(f"ckpt_path={path}: {reason}") from error
    for key, value in settings.items():
        if key.startswith("callbacks.") and str(value).endswith(".StochasticWeightAveraging"):
            raise ConfigError(f"{key}={value}: cannot continue a run; start a new one, or without")
    keys = {*had, *settings} if run else {*had} & {*settings}
    if "data.crop_padding" in had:
        keys = {key for key in keys if not key.startswith(BEFORE_AUGMENT)}
    changed = {
        key: {"from": had.get(key), "to": settings.get(key)}
        for key in sorted(keys, key=lambda key: (key in OF_DATA, key.count("."), key))
        if had.get(key) != settings.get(key)
    }
    ended = position.has_ended(settings)
    for key in sorted(changed, key=lambda key: when(key) != NEVER):
        if where := position.refusal(key, ended):
            was, given = map(_shown, changed[key].values())
            raise ConfigError(
                f"{key}={given}: may not change {where}; ckpt_path={path} had {key}={was}: leave "
                "it so, or start a new run"
            )
    recorded = {k: v for k, v in changed.items() if when(k) != ALWAYS or k.startswith("trainer.")}
    return recorded, ended


def _spelled_out(settings: Mapping[str, Any]) -> dict[str, Any]:
    left = {k: v for k, v in DEFAULTS.items() if settings.get(k) is None}
    return {**settings, **left}


def _settings_before(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a checkpoint of version 0.1 has."""
    return {k: v for k, v in flat(hparams).items() if not isinstance(v, dict)}


def _shown(value: Any) -> str:
    text = "null" if value is None else clean(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

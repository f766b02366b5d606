"""Which parameters train, from which epoch, with which settings: the group ``finetune``."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sam_lightning.config.errors import ConfigError, argument_errors
from sam_lightning.models.head import head_parameters, layer_lr_factors
from sam_lightning.optim.param_groups import Settings, apply_rule, norm_and_bias, selected

Patterns = str | Sequence[str]


class Freezing:
    """Keeps parts of a model as they are, for a whole run or its first epochs.

    A layer with running statistics (BatchNorm) whose own weights do not train is in eval mode, so
    that its statistics stay; dropout goes on.

    Args:
        model: whose parameters it freezes.
        epochs: of frozen parameters by name, for how many epochs they are; infinite for all.
        batch_norm: all running statistics stay, whatever trains.
    """

    def __init__(self, model: nn.Module, epochs: Mapping[str, float], batch_norm: bool) -> None:
        self.model = model
        self.epochs = dict(epochs)
        self.batch_norm = batch_norm
        self.still: list[nn.Module] = []  # layers whose running statistics stay
        for name, p in model.named_parameters():
            if epochs.get(name) == math.inf:
                p.requires_grad_(False)

    def begin(self, epoch: int) -> bool:
        """Let train what does in an epoch, counted from 0; return whether that has changed."""
        changed = False
        for name, p in self.model.named_parameters():
            if name in self.epochs:
                trains = epoch >= self.epochs[name]
                changed |= trains != p.requires_grad
                p.requires_grad_(trains)
        if changed and self.model._compiled_call_impl is not None:
            torch.compiler.reset()  # graphs of fewer gradients count towards its limit
        still = [layer for layer in self.model.modules() if self._stays(layer)]
        for layer in {*self.still} - {*still}:
            layer.train()
        self.still = still
        return changed

    def _stays(self, layer: nn.Module) -> bool:
        if not any(name.startswith("running_") for name, _ in layer.named_buffers(recurse=False)):
            return False
        own = list(layer.parameters(recurse=False))
        return self.batch_norm or (bool(own) and not any(p.requires_grad for p in own))

    def keep_statistics(self) -> None:
        """Put into eval mode what somebody has put into training mode."""
        for layer in self.still:
            if layer.training:
                layer.eval()


def fine_tuning(
    config: Mapping[str, Any], model: nn.Module, epochs: int
) -> tuple[dict[str, Settings], Freezing | None]:
    """The settings of parameters by name, and what is frozen; freezes it.

    Args:
        config: may have ``finetune``, arguments of ``_finetune``, and ``param_groups``, rules.
        model: with its weights.
        epochs: of the run.

    Raises:
        ConfigError: a pattern matches nothing that trains, nothing is left to train, or the model
            has no order of layers that is known.
    """
    options, rules = config.get("finetune") or {}, config.get("param_groups") or ()
    settings: dict[str, Settings] = {}
    if not options and not rules:
        return settings, None
    try:
        head = head_parameters(model)
    except ValueError as error:
        raise ConfigError(f"finetune, param_groups: {error}") from error
    backbone = {name for name, _ in model.named_parameters()} - head
    words = {"norm_and_bias": norm_and_bias(model), "head": head, "backbone": backbone}
    with argument_errors("finetune"):
        freezing = _finetune(settings, model, words, epochs, **options)
    for i, rule in enumerate(rules):
        with argument_errors(f"param_groups[{i}]"):
            apply_rule(settings, model, rule, words)
    for name, own in settings.items():  # a group whose first step comes later is one of its own
        if freezing is not None and name in freezing.epochs:
            own["from_epoch"] = freezing.epochs[name]
    return settings, freezing


def _finetune(
    settings: dict[str, Settings],
    model: nn.Module,
    words: Mapping[str, set[str]],
    epochs: int,
    *,
    freeze: Patterns = (),
    unfreeze: Mapping[int, Patterns] | None = None,
    freeze_batchnorm: bool = False,
    head_lr_factor: float = 1.0,
    head_rho: float | None = None,
    layer_decay: float = 1.0,
    decay_norm_and_bias: bool = True,
) -> Freezing | None:
    frozen = dict.fromkeys(selected(model, freeze, words, "freeze"), math.inf)
    given = {int(epoch): patterns for epoch, patterns in (unfreeze or {}).items()}
    for epoch, patterns in sorted(given.items(), reverse=True):
        if not 0 < epoch < epochs:
            raise ConfigError(
                f"finetune.unfreeze.{epoch}: this run has epochs={epochs}; allowed is a number "
                f"above 0 and below; or give epochs={epoch + 1}, with debug=fast too"
            )
        chosen = selected(model, patterns, words, f"unfreeze.{epoch}")
        if not {*chosen} & {*frozen}:
            raise ConfigError(f"finetune.unfreeze.{epoch}={patterns}: matches nothing in freeze")
        frozen |= {name: float(epoch) for name in chosen if name in frozen}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if not {*names} - {*frozen}:
        raise ConfigError(f"finetune.freeze={freeze}: leaves no parameter to train")
    if layer_decay != 1:
        try:
            factors = layer_lr_factors(model, layer_decay)
        except ValueError as error:
            raise ConfigError(f"finetune.layer_decay={layer_decay}: {error}") from error
        settings |= {name: {"lr_factor": factor} for name, factor in factors.items()}
    for name in words["head"]:
        own = settings.setdefault(name, {})
        own["lr_factor"] = own.get("lr_factor", 1.0) * head_lr_factor
        own |= {} if head_rho is None else {"rho": head_rho}
    if not decay_norm_and_bias:
        apply_rule(settings, model, {"params": ["norm_and_bias"], "weight_decay": 0.0}, words)
    for name in frozen:
        settings.setdefault(name, {})
    if frozen or freeze_batchnorm:
        return Freezing(model, frozen, freeze_batchnorm)
    return None

"""What may be said of fine-tuning: the keys of ``finetune`` and of ``param_groups``."""

from collections.abc import Mapping
from typing import Annotated, Any

from sam_lightning.config.errors import ConfigError, no_such_key
from sam_lightning.config.values import (
    ABSENT,
    NonNegative,
    Positive,
    Rule,
    Section,
    Text,
    check_value,
    keys,
    within,
)

Patterns = list[Text] | Text


class Finetune(Section):
    """The keys of ``finetune``, which conf/finetune/full.yaml explains, but ``unfreeze``."""

    freeze: Patterns = ABSENT
    freeze_batchnorm: bool = ABSENT
    head_lr_factor: Positive = ABSENT
    head_rho: NonNegative | None = ABSENT
    layer_decay: Annotated[float, within(0, 1, above=True)] = ABSENT
    decay_norm_and_bias: bool = ABSENT


class GroupRule(Section):
    """The keys of an entry of ``param_groups``."""

    params: Annotated[Patterns, Rule("{}, not empty", bool)]
    lr_factor: Positive | None = ABSENT
    weight_decay: NonNegative | None = ABSENT
    rho: NonNegative | None = ABSENT


def check_tuning(values: Mapping[str, Any]) -> None:
    """Refuse keys of ``finetune`` and ``param_groups`` that nothing takes, and their values.

    Args:
        values: of the whole configuration, by dotted key.
    """
    known = [*(f"finetune.{key}" for key, _, _ in keys(Finetune)), "finetune.unfreeze"]
    for key, value in values.items():
        if not key.startswith("finetune.") or key in known:
            continue
        epochs = key.removeprefix("finetune.unfreeze.")
        if epochs == key:
            raise ConfigError(f"{key}={value}: {no_such_key(key, known)}")
        if not epochs.isdecimal():
            raise ConfigError(f"{key}={value}: allowed is a number of epochs, as in unfreeze.5")
        check_value(key, value, Patterns)
    unfreeze, rules = values.get("finetune.unfreeze"), values.get("param_groups")
    if not isinstance(unfreeze, dict | None):
        raise ConfigError(f"finetune.unfreeze={unfreeze}: allowed is null, or as {{5: [layer4]}}")
    if not isinstance(rules, list | None) or not all(isinstance(r, dict) for r in rules or ()):
        raise ConfigError(f"param_groups={rules}: allowed is null, or a list as [{{params: [fc]}}]")
    hints = {key: hint for key, hint, _ in keys(GroupRule)}
    for i, rule in enumerate(rules or ()):
        for key, value in rule.items():
            if key not in hints:
                raise ConfigError(f"param_groups[{i}].{key}={value}: {no_such_key(key, hints)}")
            check_value(f"param_groups[{i}].{key}", value, hints[key])
        if len(rule) < 2 or "params" not in rule:
            raise ConfigError(
                f"param_groups[{i}]={rule}: must have params, and one of {', '.join([*hints][1:])}"
            )

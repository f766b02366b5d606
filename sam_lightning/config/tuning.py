"""What may be said of fine-tuning: the keys of ``finetune`` and of ``param_groups``."""

from collections.abc import Mapping
from typing import Annotated, Any

from sam_lightning.config.errors import ConfigError, no_such_key
from sam_lightning.config.values import (
    NonNegative,
    Positive,
    Rule,
    Text,
    check_value,
    within,
)

Patterns = list[Text] | Text


# The keys of ``finetune``, which conf/finetune/full.yaml explains, but ``unfreeze``.
FINETUNE: dict[str, Any] = {
    "finetune.freeze": Patterns,
    "finetune.freeze_batchnorm": bool,
    "finetune.head_lr_factor": Positive,
    "finetune.head_rho": NonNegative | None,
    "finetune.layer_decay": Annotated[float, within(0, 1, above=True)],
    "finetune.decay_norm_and_bias": bool,
}
# The keys of an entry of ``param_groups``.
RULE: dict[str, Any] = {
    "params": Annotated[Patterns, Rule("{}, not empty", bool)],
    "lr_factor": Positive | None,
    "weight_decay": NonNegative | None,
    "rho": NonNegative | None,
}


def check_tuning(values: Mapping[str, Any]) -> None:
    """Refuse keys of ``finetune`` and ``param_groups`` that nothing takes, and their values.

    Args:
        values: of the whole configuration, by dotted key.
    """
    known = [*FINETUNE, "finetune.unfreeze"]
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
    for i, rule in enumerate(rules or ()):
        for key, value in rule.items():
            if key not in RULE:
                raise ConfigError(f"param_groups[{i}].{key}={value}: {no_such_key(key, RULE)}")
            check_value(f"param_groups[{i}].{key}", value, RULE[key])
        if len(rule) < 2 or "params" not in rule:
            raise ConfigError(
                f"param_groups[{i}]={rule}: must have params, and one of {', '.join([*RULE][1:])}"
            )

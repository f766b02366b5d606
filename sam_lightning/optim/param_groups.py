"""Parameter groups by name: a learning rate factor, a weight decay or a rho of their own.

    groups = param_groups(
        model,
        [
            {"params": ["norm_and_bias"], "weight_decay": 0.0},
            {"params": ["layer1", "layer2.*.conv?.weight"], "lr_factor": 0.1},
            {"params": ["fc"], "rho": 0.2},
        ],
        lr=0.05,
    )
    optimizer = SAM(groups, torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)

A pattern is a parameter's name or that of a module, with the wildcards of a shell: ``*`` (dots
too), ``?`` and ``[0-5]``. A module's stands for all parameters in it. Later rules override earlier
ones, setting by setting. Parameters with the same settings share a group; without any rule there is
one, in the model's order.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from sam_lightning.optim.methods.sam_on import is_normalization

Settings = dict[str, float]  # of one parameter: keys of ``SETTINGS``, and what its owner adds
Named = Iterable[tuple[str, Tensor]]

SETTINGS = ("lr_factor", "weight_decay", "rho")
# Parameters of torchvision's models that are no weights of a layer. timm's name theirs themselves.
EMBEDDINGS = ("*class_token", "*pos_embedding", "*relative_position_bias_table", "*layer_scale")


def param_groups(
    model: nn.Module, rules: Sequence[Mapping[str, Any]], *, lr: float | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of a model in groups, for ``SAM`` or any torch optimizer.

    Args:
        model: has the parameters.
        rules: each has ``params``, a list of patterns or the word ``norm_and_bias``, and any of
            ``lr_factor`` (> 0), ``weight_decay`` and ``rho`` (>= 0). See ``norm_and_bias``.
        lr: the learning rate, times which the factors become the ``lr`` of each group.

    Returns:
        groups with ``params`` (pairs of name and parameter), ``name`` and their settings.

    Raises:
        ValueError: a pattern matches nothing that trains, a rule has an unknown key or a value out
            of range, or a ``lr_factor`` needs ``lr``.
    """
    settings: dict[str, Settings] = {}
    words = {"norm_and_bias": norm_and_bias(model)}
    for rule in rules:
        apply_rule(settings, model, rule, words)
    groups = grouped(trainable(model), settings)
    for group in groups:
        if lr is not None:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        elif "lr_factor" in group:
            raise ValueError(f"lr_factor={group['lr_factor']}: needs lr, of which it is a factor")
    return groups


def trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and parameters that train, in the model's order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def apply_rule(
    settings: dict[str, Settings],
    model: nn.Module,
    rule: Mapping[str, Any],
    words: Mapping[str, Collection[str]],
) -> None:
    """Set what a rule says for the parameters that it selects; a setting of None says nothing.

    Args:
        settings: of each parameter by name; changed.
        model, rule: as for ``param_groups``.
        words: names of parameters that a word stands for.

    Raises:
        ValueError: as of ``param_groups``.
    """
    for key, value in rule.items():
        if key not in ("params", *SETTINGS):
            raise ValueError(f"{key}={value}: allowed are params, {', '.join(SETTINGS)}")
    given = {key: rule[key] for key in SETTINGS if rule.get(key) is not None}
    for key, value in given.items():
        if not (math.isfinite(value) and (value > 0 if key == "lr_factor" else value >= 0)):
            raise ValueError(
                f"{key}={value}: must be a number {'>' if key == 'lr_factor' else '>='} 0"
            )
    for name in selected(model, rule.get("params", ()), words):
        settings.setdefault(name, {}).update(given)


def selected(
    model: nn.Module,
    patterns: str | Sequence[str],
    words: Mapping[str, Collection[str]],
    key: str = "params",
) -> list[str]:
    """Names of the trainable parameters that match a pattern or that a word stands for.

    Raises:
        ValueError: ``key`` has a pattern that matches none of them.
    """
    names = [name for name, _ in trainable(model)]
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matching = {n for n in names if n in words[pattern]} if pattern in words else None
        if matching is None and not (matching := {n for n in names if matches(n, pattern)}):
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(
                f"{key}={pattern}: matches no parameter that trains; the model has {parts}; "
                f"other words are {', '.join(words)}"
            )
        found |= matching
    return [name for name in names if name in found]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is of a parameter or of a module that has it."""
    if not any(c in pattern for c in "*?["):
        return name == pattern or name.startswith(f"{pattern}.")
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def norm_and_bias(model: nn.Module) -> set[str]:
    """Names of the parameters that are often not decayed.

    They are those of normalisation layers, with at most one dimension (biases, LayerScale), named
    ``bias``, named by the model's own ``no_weight_decay()`` (timm's position embeddings and class
    tokens), and the like in torchvision's models.
    """
    own = getattr(model, "no_weight_decay", None)
    patterns = [*EMBEDDINGS, *(own() if callable(own) else ())]
    in_norms = {
        id(p)
        for layer in model.modules()
        if is_normalization(layer)
        for p in layer.parameters(recurse=False)
    }
    return {
        name
        for name, p in model.named_parameters()
        if p.ndim <= 1
        or id(p) in in_norms
        or name.rpartition(".")[2] == "bias"
        or any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def grouped(named: Named, settings: Mapping[str, Settings]) -> list[dict[str, Any]]:
    """Parameters in groups of the same settings, each in the order of its first parameter.

    A factor of 1 is no setting, so what differs in nothing is in one group and sums go in the same
    order as without groups. Groups are named by their settings, or not at all if there is one.

    Args:
        named: names and parameters.
        settings: by name; parameters that are missing have none.
    """
    groups: dict[tuple[tuple[str, float], ...], dict[str, Any]] = {}
    for name, p in named:
        own = {k: v for k, v in settings.get(name, {}).items() if (k, v) != ("lr_factor", 1)}
        key = tuple(sorted(own.items()))
        groups.setdefault(key, {"params": [], **own})["params"].append((name, p))
    if len(groups) > 1:
        for key, group in groups.items():  # as loggers accept it
            group["name"] = "-".join(f"{k}_{v}" for k, v in key) or "default"
    return list(groups.values())

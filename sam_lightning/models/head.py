"""The head of a classifier, and the order of the layers before it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sam_lightning.optim.methods.sam_on import is_normalization

STACKS = (nn.Sequential, nn.ModuleList)
JOINS_PREVIOUS = 99999  # timm's mark of what belongs to the layer before


def head_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that make the logits, by name; mostly one.

    They are those that timm's models name and those at the end of what ``get_classifier()``
    returns (of a distilled DeiT, VOLO and CrossViT two; neither names all of every model), else the
    last linear layer, else the last convolution (SqueezeNet), or none.
    """
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = {named} if isinstance(named, str) else {*named}
    found = [m for n, m in model.named_modules() if n in names and [*m.parameters()]]
    if callable(classifier := getattr(model, "get_classifier", None)):
        given = classifier()
        given = given if isinstance(given, tuple | list) else [given]
        found += [layer for module in given for layer in _last(module)]
    heads = {id(layer) for layer in found or _last(model)}
    return {name: layer for name, layer in model.named_modules() if id(layer) in heads}


def _last(module: nn.Module) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for kind in (nn.Linear, nn.modules.conv._ConvNd):
        layers = layers or [*filter(lambda m: isinstance(m, kind), module.modules())]
    return layers[-1:]


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of ``head_of``.

    Raises:
        ValueError: there are none.
    """
    found = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in head_of(model).items()
        for name, _ in layer.named_parameters()
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer or convolution")
    return found


def layer_ids(model: nn.Module) -> dict[str, int]:
    """The number of each parameter's layer by name, from 0 (next to the image) to the head's.

    A model with a ``group_matcher`` (timm's, or your own) says it itself, as timm's
    ``param_groups_layer_decay`` reads it; of timm's models without one, that function takes 12
    parameters for a layer. Otherwise a layer is a block: an element of a stage, or
    what stands between stages, in the order in which the model defines them. A normalisation
    between blocks belongs to the block before it, a parameter of no block, such as position
    embeddings, to the first.

    Raises:
        ValueError: all parameters but the head's would be in one layer.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix, module in model.named_modules():  # it may be inside of a wrapper, as peft's
        if hasattr(type(module), "group_matcher"):
            ids = _by_matcher(names, prefix and f"{prefix}.", module.group_matcher(coarse=False))
            return _checked(model, ids)
    head, last = tuple(head_parameters(model)), -1
    if getattr(model, "pretrained_cfg", None):  # timm's auto_group_layers
        trunk = [name for name in names if name not in head]
        ids = {name: i // 12 for i, name in enumerate(trunk)}
        return _checked(model, ids | dict.fromkeys(head, -(-len(trunk) // 12)))
    blocks: dict[str, int] = {}
    for name, block in _blocks(model):
        last += last < 0 or not is_normalization(block)
        blocks[f"{name}."] = last
    ids = {
        name: next((i for block, i in blocks.items() if name.startswith(block)), 0)
        for name in names
    }
    with_head = tuple(b for b in blocks if any(name.startswith(b) for name in head)) + head
    used = sorted({i for name, i in ids.items() if not name.startswith(with_head)})
    ids = {n: len(used) if n.startswith(with_head) else used.index(i) for n, i in ids.items()}
    return _checked(model, ids)


def _checked(model: nn.Module, ids: dict[str, int]) -> dict[str, int]:
    if max(ids.values()) < 2:
        raise ValueError(
            f"{type(model).__name__} has no layers in an order that is known; give it a method "
            "group_matcher, as timm's models have, or use param_groups"
        )
    return ids


def layer_lr_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """``decay ** (layers above)`` of each parameter by name; 1 for the head's layer.

    Raises:
        ValueError: as of ``layer_ids``.
    """
    ids = layer_ids(model)
    last = max(ids.values())
    return {name: decay ** (last - i) for name, i in ids.items()}


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with parameters that count as one layer each, by name."""
    total = sum(p.numel() for p in model.parameters())

    def wraps(module: nn.Module) -> bool:
        """The encoder of torchvision's transformers, or what wraps a whole network."""
        most = 2 * sum(p.numel() for p in module.parameters()) > total
        return most and any(_is_stack(child) or wraps(child) for child in module.children())

    def walk(module: nn.Module, prefix: str, top: bool) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            wrapper = top and type(child) not in STACKS and wraps(child)
            if wrapper or _is_stack(child) or (top and type(child) in STACKS):
                yield from walk(child, f"{prefix}{name}.", wrapper)
            elif any(True for _ in child.parameters()):
                yield f"{prefix}{name}", child

    return walk(model, "", True)


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a plain list of blocks, and not one block."""
    has_blocks = any(any(True for _ in child.children()) for child in module.children())
    return type(module) in STACKS and has_blocks


def _by_matcher(names: list[str], prefix: str, matcher: Any) -> dict[str, int]:
    """timm's grouping: ordinals from a function, or from regular expressions and what they catch.

    Names that nothing matches, such as the head's, come last.

    Args:
        names: of all parameters.
        prefix: of those of the module that has the matcher, which does not know it.
        matcher: as its ``group_matcher`` returned it.
    """
    patterns: list[tuple[re.Pattern[str], int, tuple[int, ...]]] = []
    if isinstance(matcher, Mapping):
        for ordinal, given in enumerate(matcher.values()):
            pairs = given if isinstance(given, tuple | list) else [(given, None)]
            patterns += [(re.compile(p), ordinal, suffix or ()) for p, suffix in pairs if p]

    def place(name: str) -> tuple[float, ...]:
        if not isinstance(matcher, Mapping):
            found = matcher(name)
            return tuple(found) if isinstance(found, tuple | list) else (found,)
        for pattern, ordinal, suffix in patterns:
            if caught := pattern.match(name):
                numbers = [group for group in caught.groups() if group is not None]
                return tuple(map(float, (ordinal, *numbers, *suffix)))
        return (float("inf"),)

    places = {name: place(name.removeprefix(prefix)) for name in names}
    ids: dict[tuple[float, ...], int] = {}
    last = -1
    for found in sorted(set(places.values())):
        last += last < 0 or found[-1] != JOINS_PREVIOUS
        ids[found] = last
    return {name: ids[found] for name, found in places.items()}

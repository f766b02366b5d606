"""The half of ESAM that is about where to climb; the other half is ``method.descent_fraction``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_lightning.optim.foreach import global_norm
from sam_lightning.optim.perturbation import Memory


class RandomSubsetAscent:
    """Perturb a random part of the weights: stochastic weight perturbation of ESAM.

    Du et al. 2022 (arXiv 2110.03141), stochastic weight perturbation: e = rho / beta * mask * g /
    ||g||, each tensor chosen with probability beta, so that the mean of e is SAM's. The draws come
    from torch's generator of the CPU, which a training step seeds. The authors also save the
    gradients of what is not chosen; here these are computed. The paper's sharpness-sensitive data
    selection is ``method.descent_fraction``, there gamma.

    Args:
        beta: probability of a tensor to be perturbed, in (0, 1]; the authors use 0.6 for ResNet-18
            and 0.5 for wider networks.

    Raises:
        ValueError: beta is outside (0, 1].
    """

    def __init__(self, beta: float = 0.6) -> None:
        if not 0 < beta <= 1:
            raise ValueError(f"beta={beta}: must be a number above 0 and up to 1")
        self.beta = beta

    def __call__(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        names: Sequence[str | None],
        memory: Sequence[Memory],
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Return g or zeros for each tensor, and beta * ||g||_2."""
        chosen = torch.rand(len(grads)).numpy() < self.beta  # in host memory: no wait for a device
        direction = [g if c else torch.zeros_like(g) for g, c in zip(grads, chosen, strict=True)]
        return direction, self.beta * global_norm(grads)

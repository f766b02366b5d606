"""ESAM's perturbation. Its other half is ``method.descent_fraction``."""

import torch

from sam_lightning.optim.foreach import global_norm
from sam_lightning.optim.perturbation import Direction, Names, States, Tensors


class RandomSubsetAscent:
    """Perturb a random part of the weights: stochastic weight perturbation of ESAM.

    Du et al. 2022 (arXiv 2110.03141): e = rho / beta * mask * g / ||g||, whose mean is SAM's. The
    draws come from torch's CPU generator, which a training step seeds. The authors compute no
    gradients of tensors that are not chosen. ``method.descent_fraction`` is the paper's gamma.

    Args:
        beta: probability that a tensor is perturbed, in (0, 1], else a ValueError. The authors use
            0.6 with ResNet-18 and 0.5 with wider networks.
    """

    def __init__(self, beta: float = 0.6) -> None:
        if not 0 < beta <= 1:
            raise ValueError(f"beta={beta}: must be a number above 0 and up to 1")
        self.beta = beta

    def __call__(self, weights: Tensors, grads: Tensors, names: Names, states: States) -> Direction:
        """Return g or zeros for each tensor, and beta * ||g||_2."""
        chosen = torch.rand(len(grads)).numpy() < self.beta  # in host memory: no wait for a device
        direction = [g if c else torch.zeros_like(g) for g, c in zip(grads, chosen, strict=True)]
        return direction, self.beta * global_norm(grads)

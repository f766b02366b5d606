"""VaSSO: perturb along a mean of gradients, which varies less from batch to batch."""

from sam_lightning.optim.foreach import global_norm
from sam_lightning.optim.perturbation import Direction, Names, States, Tensors, update_mean


class AveragedAscent:
    """Perturb along a running mean of g: VaSSO, Li and Giannakis 2023 (arXiv 2309.15639).

    d <- (1 - theta) * d + theta * g, then e = rho * d / ||d||. In the first step d = g, as in the
    authors' code.

    Args:
        theta: weight of the present gradient, in (0, 1], else a ValueError; 1 is SAM. The authors'
            code has 0.9.
    """

    euclidean = True

    def __init__(self, theta: float = 0.9) -> None:
        if not 0 < theta <= 1:
            raise ValueError(f"theta={theta}: must be a number above 0 and up to 1")
        self.theta = theta

    def __call__(self, weights: Tensors, grads: Tensors, names: Names, states: States) -> Direction:
        """Return d and ||d||_2; keep d, unless a gradient is not finite."""
        finite = global_norm(grads).isfinite()
        direction = [
            update_mean(state, g, self.theta, finite)
            for g, state in zip(grads, states, strict=True)
        ]
        return direction, global_norm(direction)

"""Copies of weights, to restore them bit for bit."""

import torch
from torch import Tensor

from sam_lightning.optim.foreach import copy_, norm_of_norms, norms_of


class Backup:
    """Copies of weights from before they were moved."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._copies: list[Tensor] = []

    def __bool__(self) -> bool:
        """Whether there are copies."""
        return bool(self._weights)

    def save(self, weights: list[Tensor]) -> None:
        """Copy weights that have no copy yet."""
        known = {id(w) for w in self._weights}
        new = [w for w in weights if id(w) not in known]
        copies = [torch.empty_like(w) for w in new]
        if new:
            copy_(copies, new)
        self._weights = [*self._weights, *new]
        self._copies = [*self._copies, *copies]

    def restore(self) -> None:
        """Restore the weights and drop the copies."""
        if self:
            copy_(self._weights, self._copies)
        self._weights, self._copies = [], []

    def distance(self) -> Tensor:
        """The 2-norm of weights minus copies, 0-dim; needs at least one copy."""
        # One difference at a time, since all of them take as much memory as the weights.
        pairs = zip(self._weights, self._copies, strict=True)
        return norm_of_norms([norm for w, old in pairs for norm in norms_of([w - old])])

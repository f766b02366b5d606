"""Copies of weights, to restore them bit for bit."""

import torch
from torch import Tensor

from sam_lightning.optim.foreach import copy_, norm_of_norms, norms_of


class Backup:
    """Copies of weights from before they were moved.

    On a CPU the copies keep their memory for the next step, because new pages have to be zeroed:
    that would take up to a third of a step. CUDA's allocator keeps the memory by itself.
    """

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._buffers: dict[int, Tensor] = {}  # the copies of the last step, by id(weight)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_buffers": {}}

    def __bool__(self) -> bool:
        """Whether there are copies."""
        return bool(self._weights)

    def save(self, weights: list[Tensor]) -> None:
        """Copy weights that have no copy yet."""
        known = {id(w) for w in self._weights}
        new = [w for w in weights if id(w) not in known]
        copies = [self._buffer(w) for w in new]
        if new:
            copy_(copies, new)
        self._weights = [*self._weights, *new]
        self._copies = [*self._copies, *copies]

    def restore(self) -> None:
        """Restore the weights and drop the copies."""
        if not self:
            return
        copy_(self._weights, self._copies)
        pairs = zip(self._weights, self._copies, strict=True)
        self._buffers = {id(w): copy for w, copy in pairs if w.is_cpu}
        self._weights, self._copies = [], []

    def _buffer(self, w: Tensor) -> Tensor:
        buffer = self._buffers.pop(id(w), None)
        # The weight may have been moved or converted, or another one may have its id.
        if buffer is not None and w.is_cpu and buffer.dtype is w.dtype and buffer.shape == w.shape:
            return buffer
        with torch.inference_mode(False):  # memory from that mode works only in it
            return torch.empty_like(w)

    def distance(self) -> Tensor:
        """The 2-norm of weights minus copies, 0-dim; needs at least one copy."""
        # One difference at a time, since all of them take as much memory as the weights.
        pairs = zip(self._weights, self._copies, strict=True)
        return norm_of_norms([norm for w, old in pairs for norm in norms_of([w - old])])

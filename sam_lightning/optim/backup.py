"""Copies of weights, to go back to bit for bit."""

import torch
from torch import Tensor

from sam_lightning.optim.foreach import copy_, norm_of_norms, norms_of


class Backup:
    """Copies of weights from before they were moved.

    On a CPU the copies keep their memory from one time to the next, for new pages have to be
    zeroed. CUDA's allocator keeps what is given back, for whoever needs it next.
    """

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._rooms: dict[int, Tensor] = {}  # where the last copies were, by the id of their weight

    def __bool__(self) -> bool:
        """Whether there are copies."""
        return bool(self._weights)

    def save(self, weights: list[Tensor]) -> None:
        """Copy weights that have no copy yet."""
        known = {id(w) for w in self._weights}
        new = [w for w in weights if id(w) not in known] if known else weights
        copies = self._rooms_for(new)
        if new:
            copy_(copies, new)
        self._weights = [*self._weights, *new]
        self._copies = [*self._copies, *copies]

    def restore(self) -> None:
        """Put the weights back, and give up their copies."""
        if not self:
            return
        copy_(self._weights, self._copies)
        if len(self._rooms) > len(self._weights):  # some are of weights that have gone
            copies = zip(self._weights, self._copies, strict=True)
            self._rooms = {id(w): copy for w, copy in copies if w.is_cpu}
        self._weights, self._copies = [], []

    def distance(self) -> Tensor:
        """The 2-norm of weights minus copies, 0-dim; there have to be some."""
        # One difference at a time, for all of them would take the memory of the weights again.
        pairs = zip(self._weights, self._copies, strict=True)
        return norm_of_norms([norm for w, old in pairs for norm in norms_of([w - old])])

    def _rooms_for(self, weights: list[Tensor]) -> list[Tensor]:
        rooms = []
        for w in weights:
            room = self._rooms.get(id(w))
            # The model may have been moved or converted since, or the id be another weight's now.
            if room is None or room.dtype is not w.dtype or room.shape != w.shape or not w.is_cpu:
                room = self._new_room(w)
            rooms.append(room)
        return rooms

    def _new_room(self, w: Tensor) -> Tensor:
        self._rooms.pop(id(w), None)
        with torch.inference_mode(False):  # memory made in that mode is for that mode only
            room = torch.empty_like(w)
        if w.is_cpu:
            self._rooms[id(w)] = room
        return room

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_rooms": {}}

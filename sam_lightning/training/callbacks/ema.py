"""An exponential moving average of the weights."""

from functools import partial
from typing import Annotated, Any

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from sam_lightning.config.values import Count, Index, within


class EMA(EMAWeightAveraging):
    """Lightning's EMAWeightAveraging, in which weights that stay the same do, bit for bit.

    Lightning adds ``decay`` times the average and ``1 - decay`` times the weights, which rounds
    frozen ones at each step. This moves the average towards the weights by ``1 - decay`` of the
    way. Buffers of whole numbers, such as counts of batches, are the model's.

    Args:
        decay: of the average at each step, from 0 to below 1.
        update_every_n_steps: steps between two updates.
        update_starting_at_step, update_starting_at_epoch: counted from 0; null: the first.
    """

    def __init__(
        self,
        decay: Annotated[float, within(0, 1, below=True)] = 0.999,
        update_every_n_steps: Count = 1,
        update_starting_at_step: Index | None = None,
        update_starting_at_epoch: Index | None = None,
    ) -> None:
        super().__init__(
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
            update_starting_at_epoch=update_starting_at_epoch,
        )
        del self._kwargs["avg_fn"]
        self._kwargs["multi_avg_fn"] = partial(_move, share=1 - decay)


@torch.no_grad()
def _move(averages: list[Tensor], weights: list[Tensor], _: Any, share: float) -> None:
    if averages[0].is_floating_point() or averages[0].is_complex():
        torch._foreach_lerp_(averages, weights, share)
    else:
        torch._foreach_copy_(averages, weights)

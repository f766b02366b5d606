"""The kinds of objects that an augmentation consists of."""

from random import Random

from torch import Tensor

from sam_lightning.data.augment.draws import Draws


class BatchTransform:
    """Augments whole batches on their device.

    Attributes:
        active: False where the arguments say that nothing is to be done; it is then left out.
        normalized: it takes normalised float32 images, in which 0 is the mean colour; else uint8.
    """

    active = True
    normalized = False

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise a ValueError, ``argument=value: ...``, unless images C x H x W suit it."""

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images N x C x H x W, of the same shape and type.

        It may change float32 images in place, but not uint8 ones. To do the same for an image in
        any batch, it takes all random numbers from ``draws``.
        """
        raise NotImplementedError


class BatchMix:
    """Mixes each image of a batch with its partner: another of the global batch.

    With several of them, each batch is mixed by one, and all have the same chance.

    Args:
        p: chance that a batch is mixed.
    """

    active = True

    def __init__(self, p: float = 1.0) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p={p}: must be a number from 0 to 1")
        self.p = p

    def __call__(self, images: Tensor, partners: Tensor, random: Random) -> tuple[Tensor, float]:
        """Return mixed images and the share of each image's own label.

        Args:
            images: float32 N x C x H x W, normalised.
            partners: likewise.
            random: gives the same numbers on all ranks: the only source of randomness.
        """
        raise NotImplementedError

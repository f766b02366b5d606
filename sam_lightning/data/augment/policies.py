"""Published policies, as torchvision has them, image by image."""

from torch import Tensor


class Policy:
    """One of torchvision's policies, which draw from torch's global generator."""

    def __init__(self, name: str, **options: object) -> None:
        from torchvision.transforms import v2  # slow to import, and seldom needed

        if "policy" in options:
            options["policy"] = v2.AutoAugmentPolicy[str(options["policy"]).upper()]
        self._transform = getattr(v2, name)(**options)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse images that are neither grey nor red, green and blue."""
        if shape[0] not in (1, 3):
            raise ValueError(f"needs images of 1 or 3 channels, not {shape[0]}")

    def __call__(self, image: Tensor) -> Tensor:
        """Change one image, uint8 C x H x W."""
        changed: Tensor = self._transform(image)
        return changed


class AutoAugment(Policy):
    """Pairs of changes that a search has found (Cubuk et al. 2019, arXiv 1805.09501).

    Args:
        policy: the data set that they were found on: ``cifar10``, ``svhn`` or ``imagenet``.
    """

    def __init__(self, policy: str = "cifar10") -> None:
        if policy not in ("cifar10", "svhn", "imagenet"):
            raise ValueError(f"policy={policy}: must be cifar10, svhn or imagenet")
        super().__init__("AutoAugment", policy=policy)


class RandAugment(Policy):
    """Some changes of the same strength (Cubuk et al. 2020, arXiv 1909.13719).

    Args:
        num_ops: changes of an image, one after the other.
        magnitude: their strength, 0..num_magnitude_bins - 1.
        num_magnitude_bins: number of strengths.
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 9, num_magnitude_bins: int = 31) -> None:
        if num_ops < 1:
            raise ValueError(f"num_ops={num_ops}: must be an integer >= 1")
        _check_bins(num_magnitude_bins)
        if not 0 <= magnitude < num_magnitude_bins:
            raise ValueError(f"magnitude={magnitude}: must be in 0..{num_magnitude_bins - 1}")
        options = {"magnitude": magnitude, "num_magnitude_bins": num_magnitude_bins}
        super().__init__("RandAugment", num_ops=num_ops, **options)


class TrivialAugment(Policy):
    """One change of a random strength: TA (wide) of Müller & Hutter 2021, arXiv 2103.10158.

    Args:
        num_magnitude_bins: number of strengths.
    """

    def __init__(self, num_magnitude_bins: int = 31) -> None:
        _check_bins(num_magnitude_bins)
        super().__init__("TrivialAugmentWide", num_magnitude_bins=num_magnitude_bins)


def _check_bins(bins: int) -> None:
    if bins < 2:
        raise ValueError(f"num_magnitude_bins={bins}: must be an integer >= 2")

"""CIFAR-10-C and CIFAR-100-C: the test images with published corruptions.

Hendrycks and Dietterich 2019 (arXiv 1903.12261); https://zenodo.org, records 2535967 and 3555552.
Each corruption is one file of all test images at severity 1, then at 2, up to 5.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError, one_line

SEVERITIES = 5
# The benchmark; the four more in the archives are meant for choosing hyperparameters.
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)


class CorruptedImages:
    """The files of a folder, checked when they are opened and read when they are needed.

    Args:
        folder: has ``labels.npy`` and a ``.npy`` file of each of ``CORRUPTIONS``.
        labels: of the test set; the folder must have the same in the same order.

    Raises:
        ConfigError: a file is missing or of another form, or the labels differ.
    """

    def __init__(self, folder: Path, labels: Tensor) -> None:
        self.folder = folder
        found = self._open("labels")
        if not np.array_equal(found, np.tile(labels.cpu().numpy(), SEVERITIES)):
            raise ConfigError(
                f"corruptions={folder}: labels.npy does not have the {len(labels)} labels of the "
                f"run's test set {SEVERITIES} times; is it the folder of another data set?"
            )
        self._images = {name: self._open(name) for name in CORRUPTIONS}
        for name, images in self._images.items():
            form = (images.dtype, images.ndim, len(images), images.shape[-1])
            if form != (np.uint8, 4, len(found), 3):
                raise ConfigError(
                    f"corruptions={folder}: {name}.npy is {images.dtype} {images.shape}, not uint8 "
                    f"({len(found)}, height, width, 3)"
                )

    def images(self, name: str, severity: int) -> Tensor:
        """uint8, N x 3 x H x W; severity 1 to 5."""
        part = np.array_split(self._images[name], SEVERITIES)[severity - 1]
        return torch.from_numpy(np.ascontiguousarray(part.transpose(0, 3, 1, 2)))

    def _open(self, name: str) -> np.ndarray:
        file, said = self.folder / f"{name}.npy", f"corruptions={self.folder}:"
        if not file.is_file():
            raise ConfigError(f"{said} there is no {name}.npy in it")
        try:
            opened: np.ndarray = np.lib.format.open_memmap(file, mode="r")  # no pickles, no .npz
        except Exception as error:  # a header may be wrong in many ways
            raise ConfigError(f"{said} cannot read {name}.npy ({one_line(error)})") from error
        return opened

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as reference

from sam_lightning.data.views import CenterCrop, RandomResizedCrop

SIZES = [(375, 500), (500, 375), (224, 224), (40, 300), (1, 1), (90, 91)]
INTERPOLATIONS = {
    "bilinear": reference.InterpolationMode.BILINEAR,
    "bicubic": reference.InterpolationMode.BICUBIC,
}


def photograph(height, width):
    """Noise at several scales, as uint8 H x W x 3."""
    generator = np.random.default_rng(0)
    layers = [
        np.asarray(
            Image.fromarray(
                generator.integers(0, 256, (-(-height // k), -(-width // k), 3), dtype=np.uint8)
            ).resize((width, height), Image.Resampling.BICUBIC)
        ).astype(float)
        for k in (1, 7, 60)
    ]
    return np.mean(layers, 0).round().astype(np.uint8)


def levels_apart(tensor, image):
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert tensor.shape == expected.shape
    return (tensor.int() - expected.int()).abs().max().item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_pixels_are_pillows_within_one_level(size, interpolation):
    pixels = photograph(*size)
    tensor, image = torch.from_numpy(pixels).permute(2, 0, 1), Image.fromarray(pixels)
    mode = INTERPOLATIONS[interpolation]
    seen = CenterCrop((64, 64), 0.875, interpolation)(image)
    expected = reference.center_crop(reference.resize(image, 73, mode), 64)
    assert np.array_equal(seen, expected)
    random = RandomResizedCrop(64, interpolation=interpolation)
    for seed in range(3):
        window = random.window(*size, seed)
        expected = reference.resized_crop(image, *window, [64, 64], mode)
        assert levels_apart(random(tensor, seed), expected) <= 1


def test_windows_are_uniform_in_area_and_log_uniform_in_ratio():
    view = RandomResizedCrop(1, scale=(0.1, 0.4), ratio=(0.5, 2.0))
    windows = np.array([view.window(1000, 1000, seed) for seed in range(4000)], dtype=float)
    top, left, height, width = windows.T
    assert ((top + height <= 1000) & (left + width <= 1000) & (top >= 0) & (left >= 0)).all()
    for values, low, high in [
        (height * width / 1e6, 0.1, 0.4),
        (np.log(width / height), math.log(0.5), math.log(2)),
        (top / (1000 - height), 0, 1),
        (left / (1000 - width), 0, 1),
    ]:
        # Kolmogorov and Smirnov's distance to the uniform distribution; 0.031 is p = 0.001.
        uniform = np.sort((values - low) / (high - low))
        assert np.abs(uniform - np.linspace(0, 1, len(uniform))).max() < 0.031


def test_a_narrow_image_gives_its_largest_window():
    assert RandomResizedCrop(8, scale=(0.9, 1.0)).window(10, 1000, 0) == (0, 493, 10, 13)
    assert RandomResizedCrop(8, scale=(0.9, 1.0)).window(1000, 10, 0) == (493, 0, 13, 10)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RandomResizedCrop(0), "image_size=0"),
        (lambda: RandomResizedCrop(8, scale=(0.5, 0.1)), "crop_scale=[0.5, 0.1]"),
        (lambda: RandomResizedCrop(8, ratio=(0, 1)), "crop_ratio=[0, 1]"),
        (lambda: RandomResizedCrop(8, ratio=(1, math.nan)), "crop_ratio=[1, nan]"),
        (lambda: CenterCrop((8, 8), 1.5), "crop_fraction=1.5"),
        (lambda: CenterCrop((8, 8), 1, "nearest"), "interpolation=nearest"),
    ],
)
def test_arguments_out_of_range_are_named(make, said):
    with pytest.raises(ValueError, match=r"must be|allowed") as error:
        make()
    assert str(error.value).startswith(said)

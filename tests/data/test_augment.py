"""BatchAugment against torchvision's per-image transforms and plain loops."""

import itertools
import re

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare, ks_2samp
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sam_lightning.data.augment import BatchAugment
from sam_lightning.data.seeding import draw_seed

MEAN, STD = [0.49, 0.48, 0.44], [0.2, 0.25, 0.3]
UNCHANGED = {"crop_padding": 0, "flip": False}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=seeded(seed))


def reference_normalize(image, mean=MEAN, std=STD):
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), mean, std)


@pytest.mark.parametrize(
    ("shape", "padding", "flip"),
    [((3, 16, 16), 4, True), ((1, 12, 9), 2, True), ((3, 8, 8), 3, False), ((3, 8, 10), 0, True)],
)
def test_every_image_is_one_of_torchvisions_crops_and_flips(shape, padding, flip):
    channels, height, width = shape
    mean, std = MEAN[:channels], STD[:channels]
    images = random_images(24, *shape)
    augment = BatchAugment(mean, std, crop_padding=padding, flip=flip)
    seen = set()
    for image, out in zip(images, augment(images, seeded(1)), strict=True):
        padded = F.pad(image, [padding] * 4)
        matches = []
        offsets = range(2 * padding + 1)
        for top, left, mirrored in itertools.product(offsets, offsets, (False, True)):
            crop = F.crop(padded, top, left, height, width)
            crop = F.horizontal_flip(crop) if mirrored else crop
            if torch.allclose(out, reference_normalize(crop, mean, std), atol=1e-5):
                matches.append((top, left, mirrored))
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 1
    assert flip or not any(mirrored for *_, mirrored in seen)


def draws_of(augment, n, generator):
    """Read each image's (top, left, mirrored) off pixels that hold their own coordinates."""
    side = 12
    coordinates = torch.stack(torch.meshgrid(*[torch.arange(1, side + 1)] * 2, indexing="ij"))
    out = augment(coordinates.to(torch.uint8).expand(n, 2, side, side), generator)
    out = out.round().long()
    row, column = out[:, 0, 6, 6], out[:, 1, 6, 6]
    mirrored = out[:, 1, 6, 7] < column
    # pixel 6 shows pixel 6 + offset - 4 of the image, or 5 + offset - 4 mirrored; both count from 1
    return row - 3, torch.where(mirrored, column - 2, column - 3), mirrored.long()


def test_offsets_and_flips_are_uniform_and_independent():
    augment = BatchAugment([0.0, 0.0], [1 / 255, 1 / 255])
    top, left, mirrored = draws_of(augment, 40_000, seeded(2))
    joint = torch.bincount((top * 9 + left) * 2 + mirrored, minlength=162)
    assert len(joint) == 162
    assert chisquare(joint.numpy()).pvalue > 1e-3
    for draw in (top, left, mirrored):  # an image and its neighbour in the batch
        levels = int(draw.max()) + 1
        pairs = torch.bincount(draw[:-1] * levels + draw[1:]).view(levels, levels)
        assert chi2_contingency(pairs.numpy()).pvalue > 1e-3


def test_pixel_moments_equal_those_of_torchvisions_pipeline():
    image, n = random_images(3, 10, 10), 4000
    pipeline = v2.Compose(
        [
            v2.RandomCrop(10, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack([pipeline(image) for _ in range(n)])
    ours = BatchAugment(MEAN, STD)(image.expand(n, 3, 10, 10), seeded(3))
    for power in (1, 2):
        a, b = ours.double() ** power, theirs.double() ** power
        standard_error = ((a.var(0) + b.var(0)) / n).sqrt()
        z = (a.mean(0) - b.mean(0)) / standard_error
        assert z.abs().max() < 4.5  # of 300 pixels
        assert z.abs().mean() < 1.2


def test_normalize_is_torchvisions():
    images = random_images(5, 3, 6, 7)
    out = BatchAugment(MEAN, STD).normalize(images)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference_normalize(images), atol=1e-6, rtol=1e-5)
    out = BatchAugment(MEAN, STD, **UNCHANGED)(images, seeded(0))
    torch.testing.assert_close(out, reference_normalize(images), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "policy", [None, "autoaugment", "autoaugment_svhn", "trivialaugment", "randaugment"]
)
def test_output_depends_on_the_generator_only(policy):
    images = random_images(16, 3, 12, 12)
    before = images.clone()
    augment = BatchAugment(MEAN, STD, cutout=4, policy=policy)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = augment(images, seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert torch.equal(augment(images, seeded(5)), first)
    generator = seeded(5)
    assert torch.equal(augment(images, generator), first)
    assert not torch.equal(augment(images, generator), first)
    assert not torch.equal(augment(images, seeded(6)), first)
    assert torch.equal(images, before)


def devries_mask(height, width, length, y, x):
    """The loop body of Cutout in the code of DeVries & Taylor, without its random numbers."""
    mask = torch.ones(height, width, dtype=torch.bool)
    y1, y2 = max(0, y - length // 2), min(height, y + length // 2)
    x1, x2 = max(0, x - length // 2), min(width, x + length // 2)
    mask[y1:y2, x1:x2] = False
    return mask


def test_cutout_is_that_of_devries_and_taylor_around_uniform_centres():
    height, width, length, n = 8, 7, 6, 20_000
    centres = {
        tuple(devries_mask(height, width, length, y, x).flatten().tolist()): i
        for i, (y, x) in enumerate(itertools.product(range(height), range(width)))
    }
    assert len(centres) == height * width
    images = torch.full((n, 3, height, width), 200, dtype=torch.uint8)
    augment = BatchAugment(MEAN, STD, **UNCHANGED, cutout=length)
    out = augment(images, seeded(4))
    kept = out != 0
    assert torch.equal(kept[:, :1].expand_as(kept), kept)
    assert torch.equal(out[kept], augment.normalize(images)[kept])
    found = [centres[tuple(mask)] for mask in kept[:, 0].flatten(1).tolist()]
    counts = torch.bincount(torch.tensor(found), minlength=height * width)
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_an_odd_cutout_has_the_asked_side():
    images = torch.full((500, 1, 9, 9), 255, dtype=torch.uint8)
    out = BatchAugment([0.5], [0.5], **UNCHANGED, cutout=3)(images, seeded(0))
    assert (out == 0).sum((1, 2, 3)).unique().tolist() == [4, 6, 9]


def torchvision_policy(name):
    return {
        "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
        "autoaugment_svhn": v2.AutoAugment(v2.AutoAugmentPolicy.SVHN),
        "trivialaugment": v2.TrivialAugmentWide(),
        "randaugment": v2.RandAugment(),
    }[name]


def changes(outputs, image):
    """Per copy of ``image``, the mean absolute change of its pixels."""
    return (outputs.float() - image.float()).abs().mean((1, 2, 3)).numpy()


@pytest.mark.parametrize(
    "name", ["autoaugment", "autoaugment_svhn", "trivialaugment", "randaugment"]
)
def test_a_policy_is_drawn_for_every_image_as_torchvision_draws_it(name):
    ramp = torch.arange(20 * 20).view(20, 20) % 251
    image = torch.stack([ramp, ramp.T, 250 - ramp]).to(torch.uint8)
    n = 600
    augment = BatchAugment([0.0] * 3, [1 / 255] * 3, **UNCHANGED, policy=name)
    ours = augment(image.expand(n, 3, 20, 20), seeded(8)).round()
    reference = {}
    for other in ("autoaugment", "autoaugment_svhn", "trivialaugment", "randaugment"):
        policy = torchvision_policy(other)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            reference[other] = torch.stack([policy(image) for _ in range(n)])
    similarity = {
        other: ks_2samp(changes(ours, image), changes(outputs, image)).pvalue
        for other, outputs in reference.items()
    }
    assert similarity.pop(name) > 1e-3
    assert max(similarity.values()) < 1e-3
    # as many different results as torchvision has, so copies are not drawn together
    ours_unique, theirs = len(ours.unique(dim=0)), len(reference[name].unique(dim=0))
    assert 0.8 * theirs < ours_unique < 1.25 * theirs


def test_the_order_is_crop_and_flip_then_policy_then_normalisation_then_cutout():
    images = random_images(32, 3, 12, 12) // 2
    augment = BatchAugment(MEAN, STD, cutout=4, policy="trivialaugment")
    plain = BatchAugment(MEAN, STD)
    augment.policy = lambda image: 255 - image
    generator = seeded(3)
    changed = augment.transform(images, generator)
    assert torch.equal(changed, 255 - plain.transform(images, seeded(3)))
    assert (changed == 255).any()  # the black border was there before the policy
    finished = augment.finish(changed, generator)
    assert torch.equal(finished, augment(images, seeded(3)))
    kept = finished != 0
    assert 0 < (~kept).sum() < kept.numel() / 4
    assert torch.equal(finished[kept], plain.normalize(changed)[kept])


def test_grey_images_take_policies():
    images = random_images(8, 1, 12, 12)
    out = BatchAugment([0.5], [0.5], policy="trivialaugment")(images, seeded(0))
    assert out.shape == images.shape


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_operation_waits_for_the_device_and_none_is_done_per_image():
    augment = BatchAugment(MEAN, STD, cutout=4)
    counts = []
    for n in (4, 64):
        with Operations() as operations:
            augment(random_images(n, 3, 12, 12), seeded(0))
        assert not {"_local_scalar_dense", "nonzero", "masked_select"} & set(operations.names)
        counts.append(len(operations.names))
    assert counts[0] == counts[1]


@pytest.mark.gpu
def test_on_cuda_nothing_waits_and_draws_follow_the_generator():
    augment = BatchAugment(MEAN, STD, cutout=4)
    images = random_images(8, 3, 12, 12).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    augment(images, generator)  # copies mean and std to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(images, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first = augment(images, generator.manual_seed(1))
    assert not torch.equal(augment(images, generator), first)
    assert torch.equal(augment(images, generator.manual_seed(1)), first)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"mean": []}, "mean"),
        ({"mean": [0.1, float("nan"), 0.1]}, "mean"),
        ({"std": [0.1, 0.1]}, "std"),
        ({"std": [0.1, 0.0, 0.1]}, "std"),
        ({"crop_padding": -1}, "crop_padding=-1"),
        ({"cutout": -2}, "cutout=-2"),
        ({"policy": "mixup"}, "policy='mixup'"),
        ({"mean": [0.5] * 2, "std": [0.5] * 2, "policy": "randaugment"}, "policy"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(change, key):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}") as caught:
        BatchAugment(**{"mean": MEAN, "std": STD, **change})
    assert "\n" not in str(caught.value)


def test_draw_seeds_do_not_collide_and_use_all_bits():
    parts = [
        *itertools.product(range(30), range(30)),
        *itertools.product(range(9), repeat=3),
        (12,),
    ]
    seeds = [draw_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert seeds == [draw_seed(*p) for p in parts]
    assert draw_seed(-1, 2**80) != draw_seed(1, 2**80)
    assert 0 <= min(seeds) <= max(seeds) < 2**63
    for bit in range(63):
        share = sum(seed >> bit & 1 for seed in seeds) / len(seeds)
        assert 0.4 < share < 0.6

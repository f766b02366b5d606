"""Each augmentation against torchvision's for one image, or against plain loops."""

import itertools
import random
import re

import numpy as np
import pytest
import torch
from scipy.stats import beta, chi2_contingency, chisquare, ks_2samp, kstest
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sam_lightning.data.augment import (
    AutoAugment,
    BatchAugment,
    BatchTransform,
    ColorJitter,
    CutMix,
    Cutout,
    Draws,
    Mixup,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    TrivialAugment,
    crop_flip,
)
from sam_lightning.data.augment.draws import streams
from sam_lightning.data.augment.pipeline import BatchKey
from sam_lightning.data.seeding import draw_seed

MEAN, STD = [0.49, 0.48, 0.44], [0.2, 0.25, 0.3]
CPU = torch.device("cpu")
# Each augmentation alone, so that all of its images change.
KINDS = {
    "crop": RandomCrop(3),
    "flip": RandomHorizontalFlip(0.5),
    "jitter": ColorJitter(0.4, 0.4, 0.4, 0.1),
    "cutout": Cutout(4),
    "erasing": RandomErasing(0.8),
    "autoaugment": AutoAugment("imagenet"),
    "randaugment": RandAugment(),
    "trivialaugment": TrivialAugment(),
    "torchvision": v2.GaussianBlur(3),
}


def random_images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def key_of(indices, epoch=0, batch=0, copies=0, partners=None):
    return BatchKey(epoch, batch, np.asarray(indices), copies, partners)


def augmented(entries, images, indices=None, epoch=0, seed=0, mean=MEAN, std=STD):
    channels = images.shape[1]
    augment = BatchAugment(mean[:channels], std[:channels], entries, seed)
    key = key_of(range(len(images)) if indices is None else indices, epoch)
    return augment(augment.in_loader(images, key), torch.zeros(len(images)), key)[0]


def bytes_of(entries, images, **options):
    out = augmented(entries, images, mean=[0.0] * 3, std=[1 / 255] * 3, **options)
    return out.round().to(torch.uint8)


def draws_of(index, name, epoch=0, seed=0):
    """What an entry draws for one image: the same as in any batch."""
    return Draws(streams(draw_seed(seed, 0), epoch, np.array([index])), name, CPU)


def reference_normalize(image, mean=MEAN, std=STD):
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), mean, std)


# ---- random numbers


def many(count=40_000, name="a", epoch=0, seed=0, first=0):
    return Draws(streams(seed, epoch, np.arange(first, first + count)), name, CPU)


def test_draws_are_uniform():
    for row in many().uniform(8):
        assert kstest(row, "uniform").pvalue > 1e-4
    below = many(name="b").integers(6, 7)
    for row in below:
        assert chisquare(np.bincount(row, minlength=7)).pvalue > 1e-4


@pytest.mark.parametrize(
    "others",
    [
        {"name": "b"},
        {"epoch": 1},
        {"seed": 1},
        {"first": 1},
        {"first": 40_000},
    ],
)
def test_draws_are_independent(others):
    ones, others = many().integers(4, 6), many(**others).integers(4, 6)
    for i, j in itertools.product(range(4), repeat=2):
        table = np.bincount(ones[i] * 6 + others[j], minlength=36).reshape(6, 6)
        assert chi2_contingency(table).pvalue > 1e-5
    for i, j in itertools.combinations(range(4), 2):  # of one image
        table = np.bincount(ones[i] * 6 + ones[j], minlength=36).reshape(6, 6)
        assert chi2_contingency(table).pvalue > 1e-5


def uniform_of(seed, epoch, index, name, copy=0):
    """An image's numbers for an entry, by the definition of SplitMix64 in whole numbers."""

    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    gamma = 0x9E3779B97F4A7C15
    start = mix(((index | copy << 40) * gamma + draw_seed(seed, epoch)) % 2**64)
    place = start + draw_seed(*name.encode())
    return [(mix((place + i * gamma) % 2**64) >> 11) * 2.0**-53 for i in (1, 2, 3)]


def test_draws_are_splitmix64():
    draws = Draws(streams(7, 3, np.array([5, 12_345])), "flip", CPU)
    first, second = draws.uniform(2), draws.uniform(1)
    assert [*first[:, 1], *second[:, 1]] == uniform_of(7, 3, 12_345, "flip")
    copies = streams(7, 3, np.array([12_345] * 3), np.arange(3))
    for copy, numbers in enumerate(Draws(copies, "flip", CPU).uniform(3).T):
        assert [*numbers] == uniform_of(7, 3, 12_345, "flip", copy)


@pytest.mark.parametrize("name", KINDS)
def test_an_image_is_augmented_the_same_in_any_batch(name):
    images, entries = random_images(24, 3, 16, 16), {name: KINDS[name]}
    whole = augmented(entries, images)
    assert (whole != augmented({}, images)).flatten(1).any(1).float().mean() > 0.3
    assert torch.equal(augmented({"other": RandomCrop(0), **entries}, images), whole)
    for part in ([5], [20, 3, 11], range(23, 8, -1)):
        assert torch.equal(augmented(entries, images[[*part]], part), whole[[*part]])
    for change in ({"epoch": 1}, {"seed": 1}, {"indices": range(1, 25)}):
        other = augmented(entries, images, **change)
        assert (other != whole).flatten(1).any(1).float().mean() > 0.3


def test_global_generators_stay_as_they_are():
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before, images = states(), random_images(4, 3, 12, 12)
    kept = images.clone()
    one, two = augmented(KINDS, images), None
    assert states() == before
    torch.manual_seed(11), random.seed(11), np.random.seed(11)
    two = augmented(KINDS, images)
    assert torch.equal(one, two)
    assert torch.equal(images, kept)


def test_an_own_transform_may_draw_from_numpy_and_python_too():
    def noise(image):
        level = torch.tensor(random.randrange(256), dtype=torch.uint8)
        other = np.random.randint(256, size=tuple(image.shape)).astype(np.uint8)
        return image + level + torch.from_numpy(other)

    images = torch.zeros(20, 1, 2, 2, dtype=torch.uint8)
    out = augmented({"noise": noise}, images)
    assert len(out.flatten(1).unique(dim=0)) == 20
    assert torch.equal(augmented({"noise": noise}, images[7:9], [7, 8]), out[7:9])


# ---- crop and flip


@pytest.mark.parametrize(
    ("shape", "padding", "p"),
    [((3, 16, 16), 4, 0.5), ((1, 12, 9), 2, 0.5), ((3, 8, 8), 3, 0), ((3, 8, 10), 0, 0.5)],
)
@pytest.mark.parametrize("order", [("crop", "flip"), ("flip", "crop")])
def test_every_image_is_one_of_torchvisions_crops_and_flips(shape, padding, p, order):
    channels, height, width = shape
    mean, std = MEAN[:channels], STD[:channels]
    images = random_images(24, *shape)
    kinds = {"crop": RandomCrop(padding), "flip": RandomHorizontalFlip(p)}
    seen = set()
    out = augmented({name: kinds[name] for name in order}, images)
    for i, image in enumerate(images):
        padded = F.pad(image, [padding] * 4)
        matches = []
        offsets = range(2 * padding + 1)
        for top, left, mirrored in itertools.product(offsets, offsets, (False, True)):
            crop = F.crop(padded, top, left, height, width)
            crop = F.horizontal_flip(crop) if mirrored else crop
            if torch.allclose(out[i], reference_normalize(crop, mean, std), atol=1e-5):
                matches.append((top, left, mirrored))
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 1
    assert p or not any(mirrored for *_, mirrored in seen)


def test_a_chain_is_one_transform_after_the_other():
    images, chain = (
        random_images(30, 3, 12, 12),
        [RandomCrop(2), RandomHorizontalFlip(), RandomCrop(3)],
    )
    names = ["a", "b", "c"]
    at_once = bytes_of(dict(zip(names, chain, strict=True)), images)
    for name, one in zip(names, chain, strict=True):
        images = bytes_of({name: one}, images)
    assert torch.equal(at_once, images)


@pytest.mark.parametrize("names", [["crop", "flip"], ["flip", "wide", "crop"], ["flip"]])
def test_a_batch_is_cropped_and_mirrored_as_a_loop_over_its_images_does(names):
    entries = {"crop": RandomCrop(4), "flip": RandomHorizontalFlip(0.3), "wide": RandomCrop(9)}
    images, indices, copies = random_images(50, 3, 10, 14), np.arange(50) * 103, np.arange(50) % 3
    augment = BatchAugment([0.0] * 3, [1 / 255] * 3, {name: entries[name] for name in names}, 5)
    out = augment(images, torch.zeros(50), key_of(indices, 2, copies=copies))[0]
    for i, image in enumerate(images):
        index, copy = int(indices[i]), int(copies[i])
        for name in names:
            down, across, _ = uniform_of(draw_seed(5, 0), 2, index, name, copy)
            if name == "flip":
                image = F.horizontal_flip(image) if down < 0.3 else image
            else:
                border = entries[name].padding
                top, left = (int(u * (2 * border + 1)) for u in (down, across))
                image = F.crop(F.pad(image, [border] * 4), top, left, 10, 14)
        assert torch.equal(out[i].round().to(torch.uint8), image)


def test_offsets_and_flips_are_uniform_and_independent():
    n, side = 40_000, 12
    coordinates = torch.stack(torch.meshgrid(*[torch.arange(1, side + 1)] * 2, indexing="ij"))
    images = coordinates.to(torch.uint8).expand(n, 2, side, side)
    out = augmented(crop_flip(), images, mean=[0.0] * 2, std=[1 / 255] * 2).round().long()
    row, column = out[:, 0, 6, 6], out[:, 1, 6, 6]
    mirrored = out[:, 1, 6, 7] < column
    # pixel 6 shows pixel 6 + offset - 4 of the image, or 5 + offset - 4 mirrored; both from 1 up
    top, left, mirrored = row - 3, torch.where(mirrored, column - 2, column - 3), mirrored.long()
    joint = torch.bincount((top * 9 + left) * 2 + mirrored, minlength=162)
    assert len(joint) == 162
    assert chisquare(joint.numpy()).pvalue > 1e-3
    for draw in (top, left, mirrored):  # an image and its neighbour
        levels = int(draw.max()) + 1
        pairs = torch.bincount(draw[:-1] * levels + draw[1:]).view(levels, levels)
        assert chi2_contingency(pairs.numpy()).pvalue > 1e-3


def test_normalize_is_torchvisions():
    images = random_images(5, 3, 6, 7)
    out = BatchAugment(MEAN, STD).normalize(images)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference_normalize(images), atol=1e-6, rtol=1e-5)
    assert torch.equal(augmented({}, images), out)


# ---- rectangles


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
    out = augmented({"cutout": Cutout(length)}, images)
    kept = out != 0
    assert torch.equal(kept[:, :1].expand_as(kept), kept)
    assert torch.equal(out[kept], augmented({}, images)[kept])
    found = [centres[tuple(mask)] for mask in kept[:, 0].flatten(1).tolist()]
    counts = torch.bincount(torch.tensor(found), minlength=height * width)
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_an_odd_cutout_has_the_asked_side():
    images = torch.full((500, 3, 9, 9), 255, dtype=torch.uint8)
    out = augmented({"cutout": Cutout(3)}, images)
    assert (out[:, 0] == 0).sum((1, 2)).unique().tolist() == [4, 6, 9]


def test_erasing_is_drawn_as_torchvision_draws_it():
    n, height, width = 4000, 24, 20
    images = torch.full((n, 3, height, width), 200, dtype=torch.uint8)
    options = {"p": 0.7, "scale": (0.05, 0.6), "ratio": (0.2, 4.0)}
    erased = augmented({"erasing": RandomErasing(**options)}, images)[:, 0] == 0
    reference = v2.RandomErasing(**options, value=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack([reference(images[0].float())[0] == 0 for _ in range(n)])
    measures = []
    for masks in (erased, theirs):
        rows, columns = masks.any(2), masks.any(1)
        boxes = rows.sum(1), columns.sum(1), rows.int().argmax(1), columns.int().argmax(1)
        assert torch.equal(masks.sum((1, 2)), boxes[0] * boxes[1])  # a rectangle
        measures.append([*boxes, boxes[0] * boxes[1]])
    assert abs((measures[0][0] > 0).float().mean() - (measures[1][0] > 0).float().mean()) < 0.04
    for ours, others in zip(*measures, strict=True):
        assert ks_2samp(ours.numpy(), others.numpy()).pvalue > 1e-3


# ---- colours


def torchvisions_jitter(image, strengths, uniform):
    """The changes of one image in their order, by the numbers that were drawn for it."""
    grey = image.shape[0] == 1
    active = [n for n, s in strengths.items() if s and not (grey and n in ("saturation", "hue"))]
    orders = [*itertools.permutations(active)]
    order = orders[int(uniform[0] * len(orders))]
    for name in order:
        s, u = strengths[name], uniform[1 + [*strengths].index(name)]
        low, high = (-s, s) if name == "hue" else (max(0, 1 - s), 1 + s)
        image = getattr(F, f"adjust_{name}")(image, low + u * (high - low))
    return image, order


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("strengths", "orders", "most"),
    [
        ((0.9, 0, 0, 0), (1, 1), 1),
        ((0, 0.9, 0, 0), (1, 1), 1),
        ((0, 0, 2.0, 0), (1, 1), 1),
        ((0, 0, 0, 0.5), (1, 1), 1),
        ((0.4, 0.4, 0.4, 0.1), (2, 24), 3),  # a rounded level may grow in the changes that follow
    ],
)
def test_colour_jitter_is_torchvisions_to_one_level(channels, strengths, orders, most):
    images = random_images(150, channels, 14, 12)
    images[0], images[1], images[2] = 0, 255, images[2, :1]  # black, white, grey
    images[3:40] = images[3:40] // 2 + 60
    entries = {"jitter": ColorJitter(*strengths)}
    out = augmented(entries, images, mean=[0.0] * 3, std=[1 / 255] * 3).round().int()
    named = dict(zip(("brightness", "contrast", "saturation", "hue"), strengths, strict=True))
    uniform = [draws_of(i, "jitter").uniform(5)[:, 0] for i in range(150)]
    pairs = [torchvisions_jitter(i, named, u) for i, u in zip(images, uniform, strict=True)]
    assert len({order for _, order in pairs}) == orders[channels > 1]
    different = (out - torch.stack([image for image, _ in pairs]).int()).abs()
    assert different.max() <= most
    assert (different <= 1).float().mean() > 0.9998


# ---- policies


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (AutoAugment("cifar10"), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)),
        (AutoAugment("svhn"), v2.AutoAugment(v2.AutoAugmentPolicy.SVHN)),
        (AutoAugment("imagenet"), v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)),
        (RandAugment(3, 5, 20), v2.RandAugment(3, 5, 20)),
        (TrivialAugment(), v2.TrivialAugmentWide()),
    ],
)
def test_a_policy_is_torchvisions_with_a_seed_for_each_image(ours, theirs):
    images = random_images(40, 3, 20, 20)
    out = bytes_of({"policy": ours}, images)
    for i, image in enumerate(images):
        (seed,) = draws_of(i, "policy").seeds()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assert torch.equal(out[i], theirs(image))


def test_the_order_is_that_of_the_list_then_normalisation_then_rectangles():
    images = random_images(32, 3, 12, 12) // 2
    entries = {"cutout": Cutout(4), **crop_flip(), "policy": lambda image: 255 - image}
    augment = BatchAugment(MEAN, STD, entries)
    key = key_of(range(32))
    changed = augment.in_loader(images, key)
    assert torch.equal(changed, 255 - bytes_of(crop_flip(), images))
    assert (changed == 255).any()  # the black border was there before the policy
    finished, _ = augment(changed, torch.zeros(32), key)
    kept = finished != 0
    assert 0 < (~kept).sum() < kept.numel() / 4
    assert torch.equal(finished[kept], augment.normalize(changed)[kept])
    late = BatchAugment(MEAN, STD, {"policy": lambda image: 255 - image, **crop_flip()})
    assert torch.equal(late.in_loader(images, key), 255 - images)  # the rest is for the device


# ---- mixtures


def mixed_batch(entry, batch=0, n=10, side=12, seed=0, others=None):
    images = random_images(n, 3, side, side)
    augment = BatchAugment(MEAN, STD, {"mix": entry, **(others or {})}, seed)
    partners = (np.arange(n) + n // 2) % n
    labels = torch.arange(n)
    out, mixed = augment(images, labels, key_of(range(n), 0, batch, partners=partners))
    plain = augment.normalize(images)
    assert torch.equal(mixed.labels, labels)
    assert torch.equal(mixed.other, labels[partners])
    assert len(mixed.share.unique()) == 1
    assert len(mixed) == n
    return out, plain, plain[partners], float(mixed.share[0])


def test_mixup_blends_all_images_of_a_batch_by_one_beta_distributed_share():
    shares = []
    for batch in range(300):
        out, own, other, share = mixed_batch(Mixup(0.4), batch, side=2)
        for i in range(len(out)):
            torch.testing.assert_close(out[i], share * own[i] + (1 - share) * other[i])
        shares.append(share)
    assert kstest(shares, beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_cutmix_pastes_a_box_and_shares_by_its_pixels():
    size, parts = (12, 10), []
    for batch in range(300):
        images, n = random_images(4, 1, *size), 4
        augment = BatchAugment([0.5], [0.25], {"mix": CutMix(1.0)})
        partners = np.array([2, 3, 0, 1])
        key = key_of(range(n), 0, batch, partners=partners)
        out, labels = augment(images, torch.arange(n), key)
        own = augment.normalize(images)
        pasted = out[0, 0] != own[0, 0]
        rows, columns = pasted.any(1), pasted.any(0)
        box = torch.zeros(size, dtype=torch.bool)
        if pasted.any():
            top, left = int(rows.int().argmax()), int(columns.int().argmax())
            bottom, right = (
                12 - int(rows.flip(0).int().argmax()),
                10 - int(columns.flip(0).int().argmax()),
            )
            box[top:bottom, left:right] = True
        for i in range(n):
            expected = torch.where(box, own[partners[i]], own[i])
            equal = (out[i] == expected).float().mean()
            assert equal > 0.9 or not pasted.any()  # equal pixels hide parts of the box's border
        share = 1 - box.sum() / box.numel()
        parts.append((share.item(), labels.share[0].item()))
    ours, told = map(np.array, zip(*parts, strict=True))
    assert np.mean(np.isclose(ours, told)) > 0.9
    assert 0.5 < told.mean() < 0.75  # 1/2 of the uncut box, and more with the part cut off


def test_cutmix_against_the_authors_loop():
    """``rand_bbox`` of github.com/clovaai/CutMix-PyTorch with our random numbers."""
    for seed in range(200):
        images, partners = torch.zeros(1, 1, 9, 14), torch.ones(1, 1, 9, 14)
        out, share = CutMix(0.7)(images, partners, random.Random(seed))
        source = random.Random(seed)
        cut = (1 - source.betavariate(0.7, 0.7)) ** 0.5
        expected = torch.zeros(9, 14)
        centre = source.randrange(9), source.randrange(14)
        spans = []
        for length, middle in zip((9, 14), centre, strict=True):
            half = int(length * cut) // 2
            spans.append((np.clip(middle - half, 0, length), np.clip(middle + half, 0, length)))
        (top, bottom), (left, right) = spans
        expected[top:bottom, left:right] = 1
        assert torch.equal(out[0, 0], expected)
        assert share == pytest.approx(1 - float(expected.mean()))


def test_each_batch_is_mixed_by_one_of_several_and_by_its_chance():
    kinds = {"cutmix": CutMix(1.0, p=0.5)}
    counts = {"mixup": 0, "cutmix": 0, "none": 0}
    for batch in range(400):
        out, own, other, _ = mixed_batch(Mixup(5.0), batch, n=4, others=kinds)
        pasted = ((out == own) | (out == other)).all()
        kind = "none" if torch.equal(out, own) else "cutmix" if pasted else "mixup"
        counts[kind] += 1
    assert 160 < counts["mixup"] < 240
    assert 60 < counts["cutmix"] < 140
    assert 60 < counts["none"] < 145


def test_a_share_follows_seed_epoch_and_batch():
    def share(seed, epoch, batch):
        augment = BatchAugment([0.5], [0.25], {"mix": Mixup(1.0)}, seed)
        key = key_of([0, 1], epoch, batch, partners=np.array([1, 0]))
        return float(augment(random_images(2, 1, 2, 2), torch.arange(2), key)[1].share[0])

    found = [share(*key) for key in itertools.product(range(3), repeat=3)]
    assert len(set(found)) == 27
    assert found == [share(*key) for key in itertools.product(range(3), repeat=3)]


# ---- costs and errors


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


BATCHED = {**crop_flip(), "cutout": Cutout(4), "erasing": RandomErasing(), "mixup": Mixup(0.2)}


def test_no_operation_waits_for_the_device_and_none_is_done_per_image():
    augment, counts = BatchAugment(MEAN, STD, BATCHED), []
    for n in (4, 64):
        images, labels = random_images(n, 3, 12, 12), torch.zeros(n)
        key = key_of(range(n), partners=np.arange(n))
        with Operations() as operations:
            augment(images, labels, key)
        assert not {"_local_scalar_dense", "nonzero", "masked_select"} & set(operations.names)
        counts.append(len(operations.names))
    assert counts[0] == counts[1]


@pytest.mark.gpu
def test_on_cuda_nothing_waits_and_images_are_those_of_the_cpu():
    entries = {**BATCHED, "jitter": ColorJitter(0.4, 0.4, 0.4, 0.1)}
    augment = BatchAugment(MEAN, STD, entries)
    images, labels = random_images(8, 3, 12, 12), torch.arange(8)
    key = key_of(range(8), partners=(np.arange(8) + 4) % 8)
    expected, of_cpu = augment(images, labels, key)
    images, labels = images.cuda(), labels.cuda()
    augment(images, labels, key)  # copies mean and std to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, mixed = augment(images, labels, key)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), expected, atol=2 / 255 / 0.2, rtol=1e-4)
    assert torch.equal(mixed.share.cpu(), of_cpu.share)
    plain = BatchAugment(MEAN, STD, {**crop_flip(), "cutout": Cutout(4)})
    for batch in (images, images.cpu()):
        made = plain(batch, labels, key_of(range(8)))[0].cpu()
        torch.testing.assert_close(made, plain(images.cpu(), labels, key_of(range(8)))[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BatchAugment([], []), "mean"),
        (lambda: BatchAugment([0.1, float("nan"), 0.1], STD), "mean"),
        (lambda: BatchAugment(MEAN, [0.1, 0.1]), "std"),
        (lambda: BatchAugment(MEAN, [0.1, 0.0, 0.1]), "std"),
        (lambda: RandomCrop(-1), "padding=-1"),
        (lambda: RandomHorizontalFlip(1.5), "p=1.5"),
        (lambda: Cutout(-2), "side=-2"),
        (lambda: RandomErasing(p=-0.1), "p=-0.1"),
        (lambda: RandomErasing(scale=(0.5, 0.1)), "scale=[0.5, 0.1]"),
        (lambda: RandomErasing(ratio=(0.0, 1.0)), "ratio=[0.0, 1.0]"),
        (lambda: ColorJitter(brightness=-1), "brightness=-1"),
        (lambda: ColorJitter(hue=0.6), "hue=0.6"),
        (lambda: AutoAugment("cifar"), "policy=cifar"),
        (lambda: RandAugment(num_ops=0), "num_ops=0"),
        (lambda: RandAugment(magnitude=31), "magnitude=31"),
        (lambda: TrivialAugment(1), "num_magnitude_bins=1"),
        (lambda: Mixup(-1), "alpha=-1"),
        (lambda: CutMix(p=2), "p=2"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(make, said):
    with pytest.raises(ValueError, match=rf"^{re.escape(said)}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_does_not_suit_the_images_is_found_before_training():
    class Grows(BatchTransform):
        def __call__(self, images, draws):
            return torch.cat([images, images], 1)

    entries = {
        "crop": RandomCrop(9),
        "jitter": ColorJitter(),
        "grows": Grows(),
        "floats": lambda image: image / 255,
        "cutout": Cutout(9),
    }
    found = {}
    for name, check in BatchAugment([0.5] * 2, [0.5] * 2, entries).check(random_images(1, 2, 8, 8)):
        with pytest.raises(ValueError, match=r".") as caught:
            check()
        found[name] = str(caught.value)
    assert found.keys() == entries.keys()
    assert found["crop"].startswith("padding=9: must be <= 8 for images of 8 x 8 pixels")
    assert found["grows"].startswith("returns torch.uint8 (4, 8, 8) for images of torch.uint8 (2,")


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

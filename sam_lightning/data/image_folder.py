"""Folders of image files, one folder per class, and the same in tar shards."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sam_lightning.config.cluster import number
from sam_lightning.config.errors import ConfigError, argument_errors, one_line
from sam_lightning.data.cache import StoredImages
from sam_lightning.data.listing import Listing
from sam_lightning.data.prefetch import THREADS
from sam_lightning.data.shards import Packed, listed
from sam_lightning.data.share import listed_once
from sam_lightning.data.source import ImageSource, Split
from sam_lightning.data.splitting import divided
from sam_lightning.data.views import RandomResizedCrop, evaluation_view

log = logging.getLogger(__name__)


def image_folder(
    root: str,
    image_size: int | None = None,
    cache_dir: str | None = None,
    split: float | Sequence[float] | str | None = None,
    split_seed: int = 0,
    skip_broken: bool = False,
    view: str = "resize",
    crop_scale: Sequence[float] = (0.08, 1.0),
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
    crop_fraction: float | None = None,
    interpolation: str | None = None,
    crop_mode: str | None = None,
    memory_gb: float = 8.0,
    cache_gb: float | None = None,
    fetch_threads: int = THREADS,
    expected: Mapping[str, int] | None = None,
) -> ImageSource:
    """Image files in folders, as people have them.

    - ``root/train/<class>/*`` and ``root/test/<class>/*``, and maybe ``root/val/<class>/*``. The
      names may be ``Train``, ``training``, ``valid``, ``validation`` or ``testing``. Without
      ``test``, ``val`` is the test set, and without both there is none.
    - With ``split``, ``root/<class>/*``.
    - Either of them as ``python -m sam_lightning pack`` has packed it: the same images in the same
      order. Tar files of other tools in the layout of WebDataset, with ``train``, ``val`` or
      ``test`` in their names or those of their folders; with ``split``, without.
    - ImageNet as ``list_imagenet`` says.

    Classes are the sorted names of the folders. Images are files that Pillow can open, by suffix,
    at any depth, in the order of torchvision's ``ImageFolder``. Hidden files and folders, those
    that systems put there (``__MACOSX``, ``Thumbs.db``) and files of other kinds are left out and
    counted. ``sam_lightning.data.pixels`` says what an image becomes.

    Nothing is decoded until it is needed. Then it is kept, 3 x H x W bytes an image, if an image is
    seen as the same pixels each time and a split fits into ``memory_gb``.

    Args:
        root: the folder.
        image_size: side in pixels that images are brought to. None: all must have one size already.
        cache_dir: where decoded images are kept for the next run, ``data/cache`` if None. Other
            contents of files, or another ``image_size``, make a new entry.
        split: the fraction of test images; or those of training and test, or of training,
            validation and test images, which are 1 together; or a run's file ``split.json``.
            They are drawn by the files' names, each class for itself.
        split_seed: of ``split``.
        skip_broken: leave out files that cannot be decoded.
        view: what training sees. ``resize``: the same as evaluation, which resizes the shorter side
            to ``image_size`` / ``crop_fraction`` and crops the centre. ``random_resized_crop``:
            each time another part of the image.
        crop_scale, crop_ratio: smallest and largest area of that part, as fractions of the image,
            and of its width / height.
        crop_fraction: None: 0.875 for ``random_resized_crop``, and else 1.
        interpolation: ``bilinear`` or ``bicubic``, both with antialiasing; None: bilinear.
        crop_mode: of evaluation, as in ``views.CenterCrop``; None: ``center``.
        memory_gb: most that the decoded images of a split may take, in 10^9 bytes. Those of a
            larger one are decoded each time they are needed.
        cache_gb: most that copies of training shards at an address may take, in 10^9 bytes; None:
            nine tenths of what there is on their disk.
        fetch_threads: most shards that this machine fetches ahead at a time.
        expected: how many ``classes`` and images of ``train``, ``val`` and ``test`` there should
            be; a warning names other numbers.

    Raises:
        ConfigError: a folder is missing, a class is empty, the class names of the folders differ,
            ``split`` is out of its range. When images are read: files cannot be decoded, sizes
            differ without ``image_size``, or all images are of one colour.
    """
    if image_size is None and (view != "resize" or crop_fraction is not None):
        raise ConfigError(
            "data.image_size=null: data.view and data.crop_fraction need one, such as 224"
        )
    fixed = random = None
    if image_size is not None:
        with argument_errors("data"):
            size = (image_size, image_size)
            fixed = evaluation_view(size, view, crop_fraction, interpolation, crop_mode)
            if view == "random_resized_crop":
                random = RandomResizedCrop(image_size, crop_scale, crop_ratio, fixed.interpolation)
    cache = Path(os.path.expanduser(cache_dir or "data/cache"))
    limit = None if cache_gb is None else cache_gb * 1e9

    def found() -> Listing:
        listing = listed(root, split, cache, limit=limit, threads=fetch_threads)
        return listing if split is None else divided(listing, split, split_seed)

    try:
        listing = listed_once(found, repr((root, split, split_seed)), cache)
    except OSError as error:
        raise ConfigError(f"data.root={root!r}: cannot be read ({one_line(error)})") from error
    classes = listing.classes
    counts = {n: f.labels.bincount(minlength=len(classes)) for n, f in listing.splits.items()}
    trained = counts["train"] > 0
    for name, count in counts.items():
        for label in ((count > 0) & ~trained).nonzero():
            cls = classes[int(label)]
            raise ConfigError(f"data.root={root!r}: {name} has images of class {cls!r}, train none")
    if trained.sum() < 2:
        raise ConfigError(f"data.root={root!r}: needs two classes, train has {int(trained.sum())}")
    splits: dict[str, Split] = {}
    first = None
    for name, files in listing.splits.items():
        images = StoredImages(
            files,
            fixed,
            cache,
            skip_broken,
            first,
            random if name == "train" else None,
            memory_gb * 1e9,
        )
        first = first or images
        shards = torch.from_numpy(files.numbers()) if isinstance(files, Packed) else None
        splits[name] = Split(images, files.labels, files.names, shards=shards)
    test = splits.pop("test", None) or splits.pop("val", None)
    sizes = {name: len(split) for name, split in (splits | {"test": test}).items() if split}
    sizes["classes"] = len(classes)
    odd = [
        f"{name} {sizes.get(name, 0):,} (of {count:,})"
        for name, count in (expected or {}).items()
        if sizes.get(name, 0) != count
    ]
    if odd and not number("LOCAL_RANK", 0):  # not every process
        log.warning("data.root=%r: is not the whole set: %s", root, ", ".join(odd))
    return ImageSource(
        splits["train"],
        test,
        classes,
        splits.get("val"),
        listing.left_out,
        split is not None,
    )

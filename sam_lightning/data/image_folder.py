"""Folders of image files, one folder per class."""

from collections.abc import Sequence
from pathlib import Path

from sam_lightning.config.errors import ConfigError
from sam_lightning.data.cache import StoredImages
from sam_lightning.data.listing import list_images
from sam_lightning.data.source import ImageSource, Split
from sam_lightning.data.splitting import divided


def image_folder(
    root: str,
    image_size: int | None = None,
    cache_dir: str | None = None,
    split: float | Sequence[float] | str | None = None,
    split_seed: int = 0,
    skip_broken: bool = False,
) -> ImageSource:
    """Image files in folders, as people have them.

    - ``root/train/<class>/*`` and ``root/test/<class>/*``, and maybe ``root/val/<class>/*``. The
      names may be ``Train``, ``training``, ``valid``, ``validation`` or ``testing``. Without
      ``test``, ``val`` is the test set, and without both there is none.
    - With ``split``, ``root/<class>/*``.

    Classes are the sorted names of the folders. Images are files that Pillow can open, by suffix,
    at any depth, in the order of torchvision's ``ImageFolder``. Hidden files and folders, those
    that systems put there (``__MACOSX``, ``Thumbs.db``) and files of other kinds are left out and
    counted. ``sam_lightning.data.pixels`` says what an image becomes.

    Nothing is decoded until it is needed; then it is kept, 3 x H x W bytes an image.

    Args:
        root: the folder.
        image_size: side in pixels; the shorter side is resized to it and the centre is cropped, as
            torchvision's Resize and CenterCrop do. None: all images must have one size already.
        cache_dir: where decoded images are kept for the next run, ``data/cache`` if None. Other
            contents of files, or another ``image_size``, make a new entry.
        split: the fraction of test images; or those of training and test, or of training,
            validation and test images, which are 1 together; or a run's file ``split.json``.
            They are drawn by the files' names, each class for itself.
        split_seed: of ``split``.
        skip_broken: leave out files that cannot be decoded.

    Raises:
        ConfigError: a folder is missing, a class is empty, the class names of the folders differ,
            ``split`` is out of its range. When images are read: files cannot be decoded, sizes
            differ without ``image_size``, or all images are of one colour.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"data.image_size={image_size}: must be >= 1, or null")
    listing = list_images(root, split)
    if split is not None:
        listing = divided(listing, split, split_seed)
    cache = Path(cache_dir or "data/cache").expanduser()
    splits: dict[str, Split] = {}
    first = None
    for name, files in listing.splits.items():
        images = StoredImages(files, image_size, cache, skip_broken, first)
        first = first or images
        splits[name] = Split(images, files.labels, files.names)
    test = splits.get("test") or splits.pop("val", None)
    return ImageSource(
        splits["train"],
        test,
        listing.classes,
        splits.get("val"),
        listing.left_out,
        split is not None,
    )

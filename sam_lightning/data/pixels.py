"""Image files to pixels as a person sees them, the same for training, evaluation and predict."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

# Pillow runs another program for EPS, and has only names for the others.
NOT_DECODED = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
BACKGROUND = (255, 255, 255)  # white, below what is transparent
ORIENTATION = 0x0112  # EXIF: which side of the stored image is up
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MOST_RESIZED = 2**26  # pixels of a whole image that is resized before it is cropped


@cache
def formats() -> list[str]:
    """What Pillow calls the formats that are decoded."""
    Image.init()
    return sorted({*Image.OPEN} - NOT_DECODED)


@cache
def suffixes() -> frozenset[str]:
    """Suffixes of files that are taken for images, in lower case, such as ``.jpg``.

    They only choose files: the format of a file is in its content.
    """
    known = {*formats()}
    return frozenset(s for s, name in Image.registered_extensions().items() if name in known)


def decode(file: str | Path | bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """The pixels of an image file, uint8 H x W x 3 (RGB).

    Args:
        file: its path, or its content.
        size: (height, width) to bring it to, as ``cover`` does; None: as it is.

    Raises:
        OSError, ValueError, SyntaxError and others of Pillow: the file cannot be read, is no
            image, is truncated, is too large to be one, or ``visible`` refuses it.
    """
    return np.asarray(open_image(file, size))


def open_image(file: str | Path | bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """As ``decode``, an image of Pillow."""
    try:
        opened = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, "r", formats())
    except UnidentifiedImageError as error:  # which would name an address in memory
        raise UnidentifiedImageError("cannot identify image file") from error
    with opened as image:
        seen = visible(image)
    return seen if size is None else cover(seen, size)


def visible(image: Image.Image) -> Image.Image:
    """An image of any mode as a viewer shows it: RGB of 8 bits, upright, opaque.

    - EXIF's orientation is applied; of several frames the first one counts.
    - 16-bit grey from 0 to 65535 is scaled to 0 to 255, rounded; 16-bit colour is so by Pillow.
    - What is transparent shows white (``BACKGROUND``).
    - CMYK, YCCK, YCbCr, LAB, HSV, palettes and 1 bit are converted by Pillow. Colour profiles are
      not applied.

    Raises:
        ValueError: floating-point pixels, or integers of more than 16 bits.
    """
    image.load()
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # metadata may be damaged in many ways where pixels are not
        orientation = None
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    if image.mode == "F":
        raise ValueError(
            "pixels are floating-point numbers (mode F), of which nothing says what is black and "
            "what is white; save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        for mode in ("LA", "RGBA") if image.mode == "La" else ("RGBA",):  # one has no other way
            image = image.convert(mode)
        below = Image.new("RGBA", image.size, BACKGROUND)
        return Image.alpha_composite(below, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, in 16 or 32 bits, as L, or as LA if one of its levels is transparent."""
    levels: Any = np.asarray(image).astype(np.int64)
    if not 0 <= (least := levels.min()) <= (most := levels.max()) <= 65535:
        raise ValueError(
            f"pixels are integers from {least} to {most} (mode {image.mode}), and only those from "
            "0 to 65535 are taken for grey"
        )
    grey = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return grey


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image, keeping its proportions, until it covers (height, width); crop the centre.

    For a square this is torchvision's Resize to the side and CenterCrop.
    """
    height, width = size
    if image.height * width <= image.width * height:
        tall, wide = height, max(width, int(height * image.width / image.height))
    else:
        tall, wide = max(height, int(width * image.height / image.width)), width
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    bilinear = Image.Resampling.BILINEAR
    if tall * wide > MOST_RESIZED:  # a thin line: resize no more of it than is kept
        down, across = image.height / tall, image.width / wide
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        return image.resize((width, height), bilinear, box)
    resized = image.resize((wide, tall), bilinear)
    return resized.crop((left, top, left + width, top + height))

"""Image files to pixels as a person sees them, the same for training, evaluation and predict."""

import io
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

# Pillow runs another program for EPS, and has only names for the others.
NOT_DECODED = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
COMMON = ("JPEG", "PNG")  # tried first, which is faster
BACKGROUND = (255, 255, 255)  # white, below what is transparent
# What a transparent level of a PNG is in 8 bits; Pillow leaves it as the file has it.
CLEAR = {
    "L;2": lambda level: level * 85,
    "L;4": lambda level: level * 17,
    "RGB;16B": lambda levels: tuple(level >> 8 for level in levels),
}
PHOTOMETRIC = 262  # TIFF: 0 if white is zero, which Pillow knows of 1 to 8 bits
RGB = 3  # of torchvision's ImageReadMode
# Markers of JPEG: of a frame by Huffman's code, of its scan, and of what may come before that and
# says nothing of the pixels; not of what may have an orientation.
FRAMES, SCAN = (0xC0, 0xC1, 0xC2), 0xDA
SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)} - {0xE1}
PPM = re.compile(rb"P6\n(\d{1,6}) (\d{1,6})\n255\n")  # pixels of 3 bytes follow, as they are
MOST_PIXELS = 2**26  # beyond, Pillow may refuse an image
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


@cache
def formats() -> list[str]:
    """What Pillow calls the formats that are decoded, in the order in which it tries them."""
    Image.init()
    return sorted({*Image.OPEN} - NOT_DECODED, key=lambda name: (name not in COMMON, name))


@cache
def suffixes() -> frozenset[str]:
    """Suffixes of files that are taken for images, in lower case, such as ``.jpg``.

    They only choose files: the format of a file is in its content.
    """
    known = {*formats()}
    return frozenset(s for s, name in Image.registered_extensions().items() if name in known)


def open_image(file: str | Path | bytes | bytearray) -> Image.Image:
    """An image file, from its path or its content, as ``visible`` shows it.

    Raises:
        OSError, ValueError, SyntaxError and others of Pillow: the file cannot be read, is no
            image, is truncated, is too large to be one, or ``visible`` refuses it.
    """
    with _opened(file if isinstance(file, bytes | bytearray) else Path(file).read_bytes()) as image:
        return visible(image)


def decode(content: bytes | bytearray) -> Tensor:
    """The pixels of ``open_image``, uint8 3 x H x W, in memory as H x W x 3.

    Raises:
        as ``open_image``.
    """
    if found := PPM.match(content):
        width, height = map(int, found.groups())
        if len(content) - found.end() == 3 * height * width:
            pixels = torch.frombuffer(_writable(content), dtype=torch.uint8, offset=found.end())
            return pixels.view(height, width, 3).permute(2, 0, 1)
    decoder = _jpeg_decoder()
    if decoder is not None and (_is_plain_jpeg(content) or _is_upright_jpeg(content)):
        with suppress(RuntimeError):  # what it finds broken Pillow is asked, too
            data = torch.frombuffer(_writable(content), dtype=torch.uint8)
            return decoder(data, RGB, False)
    return torch.from_numpy(np.array(open_image(content))).permute(2, 0, 1)


def _writable(content: bytes | bytearray) -> bytearray:
    return content if isinstance(content, bytearray) else bytearray(content)


@cache
def _jpeg_decoder() -> Callable[[Tensor, int, bool], Tensor] | None:
    """The same pixels as Pillow's, faster; None for later versions of torchvision."""
    with suppress(ImportError, AttributeError):
        import torchvision.io  # noqa: F401  # whose decode_jpeg calls this, and warns each time

        return torch.ops.image.decode_jpeg.default
    return None


def _is_plain_jpeg(content: bytes | bytearray) -> bool:
    """Whether it is a JPEG in colour without metadata that might turn it: no in all doubts.

    Pillow takes a tenth of the time of decoding to look at the same.
    """
    at, in_colour = 2, False
    with suppress(IndexError, ValueError):  # it ends here
        while content[0] == 0xFF and content[1] == 0xD8 and content[at] == 0xFF:
            marker = content[at + 1]
            if marker == SCAN:
                return in_colour
            if marker in FRAMES:
                bits, high, low, upper, lower, components = content[at + 4 : at + 10]
                pixels = (high << 8 | low) * (upper << 8 | lower)
                in_colour = bits == 8 and components == 3 and pixels <= MOST_PIXELS
            elif marker not in SEGMENTS:
                return False
            at += 2 + (content[at + 2] << 8 | content[at + 3])
    return False


def _is_upright_jpeg(content: bytes | bytearray) -> bool:
    with _opened(content) as image:
        is_rgb = image.format == "JPEG" and image.mode == "RGB"
        return is_rgb and _orientation(image) not in UPRIGHT


def _opened(content: bytes | bytearray) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), "r", formats())
    except UnidentifiedImageError as error:  # which would name an address in memory
        heic = " (it is HEIC, which is not read: convert it to JPEG)"
        said = heic if content[4:11] in (b"ftyphei", b"ftyphev", b"ftypmif") else ""
        raise UnidentifiedImageError(f"cannot identify image file{said}") from error


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # metadata may be damaged in many ways where pixels are not
        return None


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
    tiles: Any = getattr(image, "tile", None)
    stored_as = tiles[0][3] if tiles else None
    image.load()
    if image.format == "PNG" and stored_as in CLEAR and "transparency" in image.info:
        image.info["transparency"] = CLEAR[stored_as](image.info["transparency"])
    turn = UPRIGHT.get(_orientation(image) or 0)
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
        image = Image.alpha_composite(below, image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # it would still say how to turn the stored image
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, in 16 or 32 bits, as L, or as LA if one of its levels is transparent."""
    levels: Any = np.asarray(image).astype(np.int64)
    least, most = levels.min(), levels.max()
    if not 0 <= least <= most <= 65535:
        raise ValueError(
            f"pixels are integers from {least} to {most} (mode {image.mode}), and only those from "
            "0 to 65535 are taken for grey"
        )
    if image.mode != "I" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:
        levels = 65535 - levels
    grey = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return grey

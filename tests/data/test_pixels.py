"""Image files of all kinds against Pillow's own conversions: what is loaded is what one sees."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image, ImageCms, ImageOps, __version__
from torchvision import transforms

from sam_lightning.data.pixels import decode, open_image, suffixes, visible
from sam_lightning.data.views import CenterCrop

RNG = np.random.default_rng(0)
SMOOTH = np.stack([*np.meshgrid(np.arange(0, 240, 8), np.arange(0, 160, 8)), np.full((20, 30), 90)])
RGB = Image.fromarray(SMOOTH.transpose(1, 2, 0).astype(np.uint8))
ALPHA = Image.fromarray(RNG.integers(0, 256, (20, 30), dtype=np.uint8))
YCBCR = pytest.param(
    "YCbCr",
    marks=pytest.mark.skipif(
        int(__version__.split(".")[0]) < 13, reason="Pillow 12 cannot read its own files of YCbCr"
    ),
)
GREY16 = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)


def written(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def half(form):
    content = written(Image.fromarray(RNG.integers(0, 256, (60, 60, 3), dtype=np.uint8)), form)
    return content[: len(content) // 2]


def reread(content):
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def on_white(rgba):
    pixels = np.asarray(rgba).astype(float)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


def seen(file):
    """The pixels, which are the same by both ways to them."""
    found = np.asarray(open_image(file))
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    assert np.array_equal(decode(content).permute(1, 2, 0), found)
    return found


def assert_close(found, expected, levels=1):
    assert found.dtype == np.uint8
    assert found.shape == np.shape(expected)
    assert np.abs(found.astype(float) - expected).max() <= levels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_upright(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = written(RGB, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    expected = ImageOps.exif_transpose(reread(content)).convert("RGB")
    assert expected.size == ((30, 20) if orientation < 5 else (20, 30))
    assert_close(seen(content), np.asarray(expected), 0)
    assert_close(np.asarray(visible(open_image(content))), np.asarray(expected), 0)  # turned once


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x0112, 3, 1, 6, 0, 0)
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'>"
XMP += b'<rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
THUMBNAIL = segment(0xED, b"Photoshop 3.0\0" + written(RGB, "JPEG"))


@pytest.mark.parametrize("place", ["start", "scan"])
@pytest.mark.parametrize(
    "added",
    [
        segment(0xE1, EXIF),
        segment(0xE1, XMP),
        segment(0xFE, b"by an author") + segment(0xE1, EXIF),
        THUMBNAIL + segment(0xE1, EXIF),
        b"\xff\xff" + segment(0xE1, EXIF),
        segment(0xE2, b"") + b"junk" + segment(0xE1, EXIF),
    ],
)
def test_an_orientation_is_found_wherever_pillow_finds_it(added, place):
    content = written(RGB, "JPEG")
    at = 2 if place == "start" else content.index(b"\xff\xda")
    content = content[:at] + added + content[at:]
    expected = ImageOps.exif_transpose(reread(content))
    assert expected.size == (20, 30)
    assert_close(seen(content), np.asarray(expected))
    assert seen(written(RGB, "JPEG")[:at] + THUMBNAIL + written(RGB, "JPEG")[at:]).shape[0] == 20


def test_damaged_metadata_does_not_hide_the_pixels():
    content = written(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):  # of Pillow
        assert_close(seen(content), np.asarray(reread(content)), 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", YCBCR, "LAB", "HSV"])
def test_modes_become_colours_as_pillow_converts_them(mode):
    form = {"CMYK": "JPEG", "YCbCr": "TIFF", "LAB": "TIFF"}.get(mode, "PNG")
    if mode == "HSV":
        assert_close(np.asarray(open_image(written(RGB, "PNG"))), np.asarray(RGB), 0)
        return
    content = written(RGB.convert(mode), form)  # a JPEG of CMYK is Adobe's, inverted
    image = reread(content)
    assert image.mode == mode
    if mode == "LAB":
        to_rgb = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        expected = ImageCms.applyTransform(image, to_rgb)
    else:
        expected = image.convert("RGB")
    assert_close(seen(content), np.asarray(expected))
    if mode in ("CMYK", "RGB", "YCbCr"):  # and it is not inverted
        assert_close(seen(content), np.asarray(RGB), 16)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "P one", "L", "RGB", "1", "I;16"])
def test_what_is_transparent_is_white(kind):
    options = {}
    image = RGB.copy()
    if kind in ("RGBA", "LA"):
        image = image.convert(kind)
        image.putalpha(ALPHA)
    elif kind.startswith("P"):
        image = image.quantize(16)
        options = {"transparency": bytes(range(0, 256, 16)) if kind == "P" else 3}
    elif kind == "I;16":
        levels = np.where(GREY16 > 40_000, 1000, 50_000).astype(np.uint16)
        image, options = Image.fromarray(levels), {"transparency": 1000}
    else:
        image = image.convert(kind)
        options = {"transparency": image.getpixel((3, 4))}
    content = written(image, "PNG", **options)
    if kind == "I;16":
        expected = np.repeat(np.where(levels == 1000, 255, 50_000 / 257)[..., None], 3, axis=2)
    else:
        expected = on_white(reread(content).convert("RGBA"))
    assert (expected == 255).all(2).any()
    assert_close(seen(content), expected)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "TIFF big", "PPM"])
def test_sixteen_bits_are_scaled_to_eight(form):
    kind, _, big = form.partition(" ")
    content = written(Image.fromarray(GREY16.astype(">u2") if big else GREY16), kind)
    assert reread(content).mode.startswith("I")
    assert_close(seen(content), np.repeat(GREY16[..., None] / 257, 3, axis=2), 0.5)


def png(levels, bits, colour, clear):
    """As Pillow does not write it: levels H x W (x 3) in so many bits, one of them transparent."""

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width = levels.shape[:2]
    # Each number as its bits, which fill whole bytes as all widths here are multiples of 8.
    ones = (levels.reshape(height, -1, 1) >> np.arange(bits)[::-1]) & 1
    packed = np.packbits(ones.reshape(height, -1).astype(np.uint8), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", np.atleast_1d(clear).astype(">u2").tobytes())]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_level_counts_in_the_bits_of_its_file(bits):
    most = 2**bits - 1
    levels = RNG.integers(0, most + 1, (20, 32))
    clear = levels[3, 4]
    expected = np.where(levels == clear, 255, levels * 255 / most)
    content = png(levels, bits, 0, clear)
    assert_close(seen(content), np.repeat(expected[..., None], 3, axis=2), 0.5)
    if bits == 16:
        levels = RNG.integers(0, 65536, (20, 32, 3))
        expected = levels / 257
        expected[3, 4] = 255
        assert_close(seen(png(levels, bits, 2, levels[3, 4])), expected)


@pytest.mark.parametrize("mode", ["1", "L", "I;16"])
def test_white_may_be_zero(mode):
    image = Image.fromarray(GREY16) if mode == "I;16" else RGB.convert(mode)
    content = bytearray(written(image, "TIFF"))
    entry = content.index(struct.pack("<HHI", 262, 3, 1)) + 8  # which says what zero is
    content[entry] = 1 - content[entry]
    expected = 255 - np.asarray(open_image(written(image, "TIFF"))).astype(float)
    assert_close(seen(bytes(content)), expected, 0)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_counts(form):
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    options |= {"disposal": 2} if form == "GIF" else {}
    content = written(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert_close(seen(content), np.asarray(frames[0]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (written(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point"),
        (
            written(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"),
            "to 70000",
        ),
        (written(Image.fromarray(np.full((4, 4), -1, np.int32)), "TIFF"), "from -1 to -1"),
        *[(half(f), "truncated") for f in ("JPEG", "PNG", "BMP", "TIFF", "PPM", "GIF")],
        (half("WEBP"), "could not create decoder"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
        (written(RGB, "JPEG").replace(b"\0\x14\0\x1e", b"\xff\xff\xff\xff"), "exceeds limit"),
        (b"", "cannot identify"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "it is HEIC"),
    ],
)
def test_what_is_no_picture_is_an_error(content, said):
    kinds = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
    with pytest.raises(kinds, match=said) as caught:
        open_image(content)
    assert "0x" not in str(caught.value)
    with pytest.raises(type(caught.value), match=said):
        decode(content)


def test_a_name_says_nothing_of_the_format(tmp_path):
    for name in ("a.jpg", "a", "a.PNG"):
        file = tmp_path / name
        file.write_bytes(written(RGB, "PNG"))
        for given in (file, str(file), file.read_bytes()):
            assert_close(seen(given), np.asarray(RGB), 0)


def test_suffixes_are_those_that_can_be_opened():
    assert {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".tif", ".bmp"} < suffixes()
    assert not {".eps", ".pdf", ".mpg", ".h5", ".txt", ""} & suffixes()


@pytest.mark.parametrize("size", [(9, 9), (64, 64), (16, 33), (20, 30)])
@pytest.mark.parametrize("shape", [(20, 30), (31, 17), (20, 20)])
def test_a_central_crop_is_torchvisions_resize_and_crop(size, shape):
    image = Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8))
    factor = max(size[0] / shape[0], size[1] / shape[1])
    sides = [max(int(round(s * factor, 9)), want) for s, want in zip(shape, size, strict=True)]
    steps = [transforms.Resize(sides), transforms.CenterCrop(size)]
    expected = np.asarray(transforms.Compose(steps)(image))
    assert_close(np.asarray(CenterCrop(size)(image)), expected, 0)


def test_a_thin_line_does_not_take_all_memory():
    image = Image.fromarray(RNG.integers(0, 256, (40_000, 1, 3), dtype=np.uint8))
    tracemalloc.start()
    assert CenterCrop((224, 224))(image).size == (224, 224)  # whole, it would be 6 GB
    part = np.asarray(CenterCrop((60, 60))(image)).astype(int)
    middle = np.asarray(CenterCrop((60, 60))(image.crop((0, 19_000, 1, 21_000)))).astype(int)
    assert np.abs(part - middle).max() <= 2
    tracemalloc.stop()


def test_photographs_are_those_of_pillow():
    files = [*(Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg")]
    assert len(files) == 2
    for file in files:
        expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        assert_close(seen(file), np.asarray(expected))

"""Decoding: pixels of good files, reasons for bad ones, and no file that fills the memory."""

import io
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image

from realign_fast.embed.decode import Unreadable, decode

RAMP = np.arange(40 * 48 * 3, dtype=np.uint32).reshape(48, 40, 3).astype(np.uint8)


def encoded(image, image_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width, height, body=b""):
    """A PNG of any size by its header, with next to nothing behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ends = chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + ends


def test_pixels_of_a_png_are_exact():
    image = decode(encoded(Image.fromarray(RAMP)))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), RAMP)


def test_the_content_decides_not_a_name():
    assert decode(encoded(Image.fromarray(RAMP), "BMP")).size == (40, 48)
    assert decode(encoded(Image.fromarray(RAMP), "WEBP", lossless=True)).size == (40, 48)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation, image_format):
    exif = Image.Exif()
    exif[0x0112] = orientation  # 6: the camera was turned, the top of the picture is at the right
    options = {"lossless": True} if image_format == "WEBP" else {}
    image = decode(encoded(Image.fromarray(RAMP), image_format, exif=exif, **options))
    flipped = RAMP[:, ::-1]
    turned = {2: flipped, 3: np.rot90(RAMP, 2), 4: RAMP[::-1], 5: np.rot90(flipped)}
    turned |= {6: np.rot90(RAMP, -1), 7: np.rot90(flipped, -1), 8: np.rot90(RAMP)}
    assert np.array_equal(np.asarray(image), turned.get(orientation, RAMP))


BAD_HEADER = b"\0\x08\0\x02\x01\x12\0\x03"
DAMAGED_EXIF = {
    "bad header": BAD_HEADER,
    "no entries": b"II*\0\x08\0\0",
    "four bytes": b"II*\0",
    "zeros": bytes(32),
    "endless": b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03" * 3,
}


def with_chunk(kind, data):
    """A PNG with a chunk before its pixels."""
    png = encoded(Image.fromarray(RAMP))
    place = png.index(b"IDAT") - 4
    return png[:place] + chunk(kind, data) + png[place:]


@pytest.mark.parametrize("exif", DAMAGED_EXIF.values(), ids=list(DAMAGED_EXIF))
@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG", "chunk"])
def test_damaged_exif_leaves_a_picture_as_it_is_stored(exif, image_format):
    if image_format == "chunk":
        data = with_chunk(b"eXIf", exif)
    else:
        options = {"quality": 100} if image_format == "JPEG" else {}
        data = encoded(Image.fromarray(RAMP), image_format, exif=exif, **options)
    plain = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(decode(data)), np.asarray(plain))


def test_a_picture_with_damaged_exif_in_png_is_as_stored():
    text = b"Raw profile type exif\0\nexif\n      8\nzzzz\n"  # not hexadecimal
    for data in (with_chunk(b"eXIf", BAD_HEADER), with_chunk(b"tEXt", text)):
        assert np.array_equal(np.asarray(decode(data)), RAMP)


def test_an_orientation_beside_a_damaged_tag_is_applied():
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6)  # 6 as above
    entries += struct.pack("<HHII", 0x011A, 5, 1 << 30, 0xFFFFFF)  # rationals beyond the end
    exif = b"II*\0\x08\0\0\0\x02\0" + entries + bytes(4)
    assert np.array_equal(np.asarray(decode(with_chunk(b"eXIf", exif))), np.rot90(RAMP, -1))


def test_sixteen_bits_keep_their_high_byte():
    gray = np.arange(0, 65536, 32, dtype=np.uint16).reshape(32, 64)
    image = np.asarray(decode(encoded(Image.fromarray(gray))))
    assert np.array_equal(image[..., 0], (gray >> 8).astype(np.uint8))


def test_cmyk_becomes_rgb():
    cmyk = Image.new("CMYK", (20, 20), (255, 0, 0, 0))  # cyan
    red, green, blue = np.asarray(decode(encoded(cmyk, "JPEG"))).reshape(-1, 3).mean(axis=0)
    assert red < 40
    assert min(green, blue) > 160


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_rgb(mode):
    image = Image.fromarray(RAMP).convert(mode)
    decoded = decode(encoded(image))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_a_palette_with_transparent_colours_becomes_rgb_without_a_warning(recwarn):
    image = Image.fromarray(RAMP).quantize(8)
    image.info["transparency"] = bytes(range(8))
    decoded = decode(encoded(image, transparency=bytes(range(8))))
    assert decoded.mode == "RGB"
    assert not recwarn.list


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data))[8, 8].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no image that Pillow knows"),
        (b"no image at all" * 20, "no image"),
        (encoded(Image.fromarray(RAMP), "JPEG")[:-100], "truncated"),
        (encoded(Image.fromarray(RAMP))[:-60], "truncated|Truncated"),
        (png_header(100, 100), "OSError|SyntaxError|truncated"),
        (png_header(60_000, 60_000), "DecompressionBombError"),
        (png_header(13_000, 14_000), "DecompressionBombError"),
        (png_header(1, 40_000), "too narrow"),
        (png_header(0, 10), "ValueError|SyntaxError|no image|ZeroDivision|cannot|OSError"),
        (
            encoded(Image.fromarray(RAMP[..., 0].astype(np.float32)), "TIFF"),
            "mode F; save it with 8 or 16 bits",
        ),
        (encoded(Image.fromarray(RAMP[..., 0].astype(np.int32) << 20), "TIFF"), "mode I; save"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_what_cannot_be_read_is_a_reason_in_one_line(data, words):
    with pytest.raises(Unreadable, match=words) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_every_byte_of_a_jpeg_may_be_damaged():
    data = bytearray(encoded(Image.fromarray(RAMP), "JPEG"))
    chance = np.random.default_rng(0)
    for _ in range(300):
        damaged = data.copy()
        for place in chance.integers(0, len(data), 3):
            damaged[place] = chance.integers(256)
        try:
            assert decode(bytes(damaged)).mode == "RGB"
        except Unreadable:
            pass

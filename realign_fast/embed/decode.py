"""Decoding of image files to RGB pixels.

The content of a file decides how it is decoded, not its suffix:

- EXIF orientation is applied, so that the picture stands as people see it. A picture whose EXIF
  data is damaged is taken as it is stored, as viewers do, and marked in `info[UNTURNED]`.
- 16-bit gray keeps its high byte (Pillow's own conversion would turn nearly everything white).
- Transparency is dropped as the models' own preprocessing drops it (`convert("RGB")`).
- The first frame of an animation is taken.

An image that could fill the memory is refused on account of its header: one of more than
`MAX_PIXELS`, or one so narrow that resizing its short side to the model's would take more.
"""

from __future__ import annotations

import io
import warnings
from types import ModuleType
from typing import Any

from .._extras import import_extra

MAX_PIXELS = 178_956_970  # Pillow's own limit: twice its Image.MAX_IMAGE_PIXELS
MAX_ASPECT = 1000  # of the long side to the short side
ORIENTATION = 0x0112  # a tag of EXIF
UNTURNED = "realign_fast_unturned"  # a key of `info`
SUFFIXES = frozenset("jpg jpeg jpe png webp bmp gif tif tiff ppm pgm avif jp2".split())


class Unreadable(Exception):
    """The reason why one image or caption cannot be read; it is listed and gives no row."""


def pillow() -> ModuleType:
    """Import Pillow, or raise an error that says how to install it."""
    return import_extra("PIL.Image", "clip", "Decoding images")


def decode(data: bytes) -> Any:
    """Decode the bytes of an image file to a `PIL.Image` in RGB.

    Raises:
        Unreadable: the reason, in one line.
    """
    pil = pillow()
    if not data:
        raise Unreadable("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on sizes, which are checked here, and on odd metadata
            image = pil.Image.open(io.BytesIO(data))
            size = f"{image.width} x {image.height} pixels, at most"
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"too large: {size} {MAX_PIXELS} in all")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise Unreadable(f"too narrow: {size} {MAX_ASPECT} to 1")
            image.load()
            return _as_rgb(_turned(image))
    except Unreadable:
        raise
    except pil.Image.DecompressionBombError as error:
        raise Unreadable(f"too large: {error}") from error
    except pil.UnidentifiedImageError as error:
        raise Unreadable("no image that Pillow knows") from error
    except MemoryError as error:
        raise Unreadable("out of memory while decoding") from error
    except Exception as error:  # damaged files raise OSError, SyntaxError and many more
        raise Unreadable(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error


def _turned(image: Any) -> Any:
    """Return the image turned as its EXIF orientation says; no other tag is interpreted."""
    names = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
    methods = dict(enumerate(names.split(), 2))
    try:
        method = methods.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged data raises SyntaxError, ValueError, struct.error and others
        image.info[UNTURNED] = True
        return image
    return image.transpose(pillow().Image.Transpose[method]) if method else image


def _as_rgb(image: Any) -> Any:
    if image.mode.startswith("I;16") or image.mode == "I":
        gray = image.convert("I")
        low, high = gray.getextrema()
        if low < 0 or high > 65535:
            raise Unreadable(f"32-bit pixels from {low} to {high}; save it with 8 or 16 bits")
        image = gray.point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode == "F":
        raise Unreadable("floating-point pixels; save it with 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")

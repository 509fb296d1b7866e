"""Decoding of image files to RGB pixels.

The content of a file decides how it is decoded, not its suffix:

- EXIF orientation is applied, so that the picture stands as people see it. A picture whose EXIF
  data is damaged is taken as it is stored, as viewers do.
- 16-bit gray keeps its high byte (Pillow's own conversion would turn nearly everything white).
- Transparency is dropped as the models' own preprocessing drops it (`convert("RGB")`).
- The first frame of an animation is taken.

An image that could fill the memory is refused on account of its header: one of more pixels than
Pillow's limit, or one so narrow that resizing its short side to the model's would take more.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from types import ModuleType
from typing import Any

from .._extras import import_extra

MAX_ASPECT = 1000  # of the long side to the short side
SUFFIXES = frozenset("jpg jpeg jpe png webp bmp gif tif tiff ppm pgm avif jp2".split())


class Unreadable(Exception):
    """The reason why one image or caption cannot be read; it is listed and gives no row."""


def pillow() -> ModuleType:
    """Import Pillow, or raise an error that says how to install it."""
    return import_extra("PIL.ImageOps", "clip", "Decoding images")


def decode(data: bytes) -> Any:
    """Decode the bytes of an image file to a `PIL.Image` in RGB.

    Raises:
        Unreadable: the reason, in one line.
    """
    pil = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on sizes, and on odd metadata
            image = pil.Image.open(io.BytesIO(data))
            if max(image.size) > MAX_ASPECT * min(image.size):
                size = f"{image.width} x {image.height} pixels"
                raise ValueError(f"too narrow: {size}, at most {MAX_ASPECT} to 1")
            image.load()
            with suppress(Exception):  # damaged data raises SyntaxError, struct.error and others
                pil.ImageOps.exif_transpose(image, in_place=True)
            return _as_rgb(image)
    except pil.UnidentifiedImageError as error:
        raise Unreadable("no image that Pillow knows") from error
    except Exception as error:  # damaged files raise OSError, SyntaxError and many more
        raise Unreadable(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error


def _as_rgb(image: Any) -> Any:
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}; save it with 8 or 16 bits")
    return image.convert("RGB")

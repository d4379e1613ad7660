"""Encoded images of any kind to RGB pixels, or a reason why not."""

import io
import warnings
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image


# Formats that PIL opens but does not draw itself: it would run Ghostscript, or another library that is not there.
_NOT_DRAWN = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

PIL.Image.init()
_FORMATS = tuple(name for name in PIL.Image.ID if name not in _NOT_DRAWN)

# With the dot, in lower case.
IMAGE_EXTENSIONS = frozenset(ext for ext, name in PIL.Image.registered_extensions().items() if name in _FORMATS)

_WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")

# How an image is turned upright, by the value of its EXIF orientation.
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """An image that cannot be used; the message is a short reason."""


def decode_image(file: bytes | str | Path) -> PIL.Image.Image:
    """
    The first frame of an encoded image, upright and in mode RGB; see [`to_rgb`].

    Args:
        file: The encoded bytes, or the path of a file.

    Raises:
        BadImage: If it is no image, truncated, damaged, of pixels whose range is unknown, or larger than
            `PIL.Image.MAX_IMAGE_PIXELS` (which is found out before any pixel is decoded).
    """
    if file == b"":
        raise BadImage("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as image:
                image.load()
                return to_rgb(_turn_upright(image))
    except BadImage:
        raise
    except PIL.UnidentifiedImageError:
        raise BadImage("no image of a known format") from None
    # Damaged files make PIL's readers fail in any way: IndexError, struct.error, AssertionError, MemoryError ...
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _turn_upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        orientation = image.getexif().get(PIL.ExifTags.Base.Orientation)
    except Exception:  # damaged metadata spoil no pixels
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    In mode RGB: transparent parts on white, of 16-bit greys the upper 8 bits.

    Raises:
        BadImage: If pixels are floating-point or 32-bit numbers.
        ValueError: If PIL does not convert this mode.
    """
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise BadImage("32-bit pixels, whose range is unknown")
        image = PIL.Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        white = PIL.Image.new("RGB", image.size, "white")
        image = image.convert("RGBA")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")

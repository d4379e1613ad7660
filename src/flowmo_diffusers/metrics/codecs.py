"""JPEG and WebP as reconstructors: at a quality, or within a number of bytes."""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import PIL
import PIL.features
import PIL.Image
import torch

from flowmo_diffusers.metrics.reconstruction import to_uint8
from flowmo_diffusers.metrics.reconstructors import Reconstruction, Reconstructor


class Codec(ABC):
    """
    A file format, and a packed form of it: what is left of a file when everything is taken out that is the same for
    all images of one size and quality. At a few hundred bytes an image that would be most of the file.
    """

    # The packed form in words.
    packed_form: str

    @abstractmethod
    def version(self) -> str | None:
        """Of the library behind PIL; None where PIL was built without it."""

    @abstractmethod
    def encode(self, image: PIL.Image.Image, quality: int) -> bytes:
        """An RGB image to a file; quality is from 1 to 100."""

    @abstractmethod
    def pack(self, image: PIL.Image.Image, quality: int) -> bytes:
        """An RGB image to the packed form."""

    @abstractmethod
    def unpack(self, packed: bytes, size: tuple[int, int]) -> bytes:
        """The packed form of an image of `size` (width, height) to a file."""


class JPEG(Codec):
    """
    Baseline JPEG (ITU-T T.81), chroma at half the resolution (4:2:0, PIL's default).

    The packed form is a byte of quality, from which the quantization tables follow, then Huffman tables of the image's
    own where they save more than they take (else they are those of T.81, K.3), then the entropy-coded data.
    """

    packed_form = "quality (1 byte), Huffman tables if not the standard's, entropy-coded data"

    def version(self) -> str | None:
        return PIL.features.version("libjpeg_turbo") or PIL.features.version("jpg")

    def encode(self, image: PIL.Image.Image, quality: int, optimize: bool = True) -> bytes:
        return _file(image, "JPEG", quality=quality, subsampling="4:2:0", optimize=optimize)

    def pack(self, image: PIL.Image.Image, quality: int) -> bytes:
        _, _, data = _split_jpeg(self.encode(image, quality, optimize=False))
        own_tables, _, own_data = _split_jpeg(self.encode(image, quality))
        return bytes([quality]) + min(data, own_tables + own_data, key=len)

    def unpack(self, packed: bytes, size: tuple[int, int]) -> bytes:
        blank = self.encode(PIL.Image.new("RGB", size), packed[0], optimize=False)
        tables, header, _ = _split_jpeg(blank)
        own_tables, data = _split_tables(packed[1:])
        return _SOI + tables + own_tables + header + data + _EOI


class WebP(Codec):
    """
    Lossy WebP (RFC 9649) by the slowest and best method. The packed form is the VP8 frame without its start code and
    size (RFC 6386, 9.1): the quantizers are inside.
    """

    packed_form = "VP8 frame without start code and size"

    def version(self) -> str | None:
        return PIL.features.version("webp")

    def encode(self, image: PIL.Image.Image, quality: int) -> bytes:
        return _file(image, "WEBP", quality=quality, method=6)

    def pack(self, image: PIL.Image.Image, quality: int) -> bytes:
        file = self.encode(image, quality)
        # "RIFF", size, "WEBP", "VP8 ", size, and the frame: a tag of 3 bytes, start code, width, height, the rest.
        return file[20:23] + file[30:]

    def unpack(self, packed: bytes, size: tuple[int, int]) -> bytes:
        sides = b"".join(side.to_bytes(2, "little") for side in size)
        frame = packed[:3] + b"\x9d\x01\x2a" + sides + packed[3:]
        chunk = b"WEBPVP8 " + len(frame).to_bytes(4, "little") + frame
        return b"RIFF" + len(chunk).to_bytes(4, "little") + chunk


CODECS: dict[str, Codec] = {"jpeg": JPEG(), "webp": WebP()}

_QUALITIES = range(1, 101)

# JPEG's markers: start and end of an image, Huffman tables, start of a scan.
_SOI, _EOI, _DHT, _SOS = b"\xff\xd8", b"\xff\xd9", b"\xff\xc4", b"\xff\xda"


class CodecReconstructor(Reconstructor):
    """
    An image codec, at one quality or within a number of bytes an image.

    At a quality, whole files are counted, as they would lie on a disk.

    Within a number of bytes, what is counted is what has to be kept of each image by someone who has all images of a
    set to keep, and to whom their size is known, as it is to a tokenizer's decoder: the codec's packed form ([`JPEG`],
    [`WebP`]) and a byte of scale. So no codec spends its bytes on headers and tables that never change. Each image has
    the highest quality that fits (found by bisection and a look at the qualities just above: sizes only nearly grow
    with it). And as codecs do badly at their lowest qualities, an image may be shrunk to some eighths of its sides
    first and enlarged again, both with Lanczos' filter: of all eighths those of the least squared error are taken.

    Images are rounded to 8 bits first.

    Args:
        codec: "jpeg" or "webp".
        quality: From 1 to 100, for all images.
        num_bytes: The most bytes an image may take; either this or `quality` must be given.

    Raises:
        ValueError: If the codec is unknown, not exactly one of `quality` and `num_bytes` is given, or out of range.
        OSError: If PIL was built without the codec.
    """

    def __init__(self, codec: str, quality: int | None = None, num_bytes: int | None = None):
        if codec not in CODECS:
            raise ValueError(f"codec={codec!r} must be one of {list(CODECS)}")
        if (quality is None) == (num_bytes is None):
            raise ValueError(f"exactly one of quality={quality} and num_bytes={num_bytes} must be given")
        if quality is not None and quality not in _QUALITIES:
            raise ValueError(f"quality={quality} must be a whole number from 1 to 100")
        if num_bytes is not None and num_bytes < 1:
            raise ValueError(f"num_bytes={num_bytes} must be positive")
        self.codec = CODECS[codec]
        self.quality = quality
        self.num_bytes = num_bytes
        version = self.codec.version()
        if version is None:
            raise OSError(f"this installation of Pillow has no {codec}; the wheels on PyPI have it")
        settings = {
            "class": type(self).__name__,
            "codec": codec,
            "library": version,
            "pillow": PIL.__version__,
            "quality": quality,
            "num_bytes": num_bytes,
            "counted": "whole file" if num_bytes is None else f"scale (1 byte), {self.codec.packed_form}",
        }
        super().__init__(f"{codec}, {num_bytes} bytes" if quality is None else f"{codec}, quality {quality}", settings)

    def __call__(self, images: torch.Tensor, numbers: Sequence[int]) -> Reconstruction:
        """
        See [`Reconstructor`].

        Raises:
            ValueError: If an image does not fit into `num_bytes` in any way; the message has the least that it needs.
        """
        originals = [PIL.Image.fromarray(pixels) for pixels in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]
        stored = [self.encode(image) for image in originals]
        decoded = [np.asarray(self.decode(data, image.size)) for data, image in zip(stored, originals, strict=True)]
        reconstructions = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return Reconstruction(reconstructions, torch.tensor([len(data) for data in stored], dtype=torch.float64))

    def encode(self, image: PIL.Image.Image) -> bytes:
        """An RGB image to what is stored of it, which is what is counted; raises `ValueError` if it does not fit."""
        return self._encode_within(image) if self.quality is None else self.codec.encode(image, self.quality)

    def decode(self, stored: bytes, size: tuple[int, int]) -> PIL.Image.Image:
        """What is stored of an image of `size` (width, height) to the image."""
        file = stored
        if self.quality is None:
            file = self.codec.unpack(stored[1:], _scaled(size, stored[0]))
        return PIL.Image.open(io.BytesIO(file)).convert("RGB").resize(size, PIL.Image.Resampling.LANCZOS)

    def _encode_within(self, image: PIL.Image.Image) -> bytes:
        best, least = None, math.inf
        for eighths in range(8, 0, -1):
            small = image.resize(_scaled(image.size, eighths), PIL.Image.Resampling.LANCZOS)
            # What is lost by shrinking alone grows as images shrink: the rest cannot be better.
            if _error(image, small.resize(image.size, PIL.Image.Resampling.LANCZOS)) >= least:
                break
            packed = self._pack_within(small, self.num_bytes - 1)
            if packed is None:
                continue
            stored = bytes([eighths]) + packed
            error = _error(image, self.decode(stored, image.size))
            if error < least:
                best, least = stored, error
        if best is None:
            needed = 1 + len(self.codec.pack(small, _QUALITIES[0]))
            raise ValueError(
                f"num_bytes={self.num_bytes} is too small for {self.settings['codec']} of an image of {image.width} x "
                f"{image.height} pixels, which takes at least {needed} bytes"
            )
        return best

    def _pack_within(self, image: PIL.Image.Image, num_bytes: int) -> bytes | None:
        """At the highest quality that fits; None if the lowest does not."""
        low, high = _QUALITIES.start, _QUALITIES.stop
        best = self.codec.pack(image, low)
        if len(best) > num_bytes:
            return None
        while high - low > 1:
            quality = (low + high) // 2
            packed = self.codec.pack(image, quality)
            if len(packed) <= num_bytes:
                best, low = packed, quality
            else:
                high = quality
        # A higher quality takes fewer bytes now and then, of WebP at up to one step in twenty.
        for quality in range(high + 1, min(high + 4, _QUALITIES.stop)):
            packed = self.codec.pack(image, quality)
            if len(packed) <= num_bytes:
                best = packed
        return best


def _scaled(size: tuple[int, int], eighths: int) -> tuple[int, int]:
    width, height = (max(1, round(side * eighths / 8)) for side in size)
    return width, height


def _error(x: PIL.Image.Image, y: PIL.Image.Image) -> int:
    """Sum of squared differences of the pixels."""
    return int(np.square(np.asarray(x, dtype=np.int64) - np.asarray(y)).sum())


def _file(image: PIL.Image.Image, file_format: str, **options: int | str | bool) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _split_jpeg(file: bytes) -> tuple[bytes, bytes, bytes]:
    """A file of one scan to its Huffman tables, the other segments in front of the scan's data, and these."""
    tables, header, position, marker = b"", b"", len(_SOI), b""
    while marker != _SOS:
        marker = file[position : position + 2]
        end = position + 2 + int.from_bytes(file[position + 2 : position + 4], "big")
        if marker == _DHT:
            tables += file[position:end]
        else:
            header += file[position:end]
        position = end
    return tables, header, file[position : -len(_EOI)]


def _split_tables(data: bytes) -> tuple[bytes, bytes]:
    """Huffman tables, if there are any, and what follows; entropy-coded data never look like their marker."""
    position = 0
    while data[position : position + 2] == _DHT:
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return data[:position], data[position:]

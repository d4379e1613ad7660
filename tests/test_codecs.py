"""What a codec is said to store is what its images come back from, and no byte is counted that would not be kept."""

import io
import json
import re
import struct

import numpy as np
import PIL.features
import PIL.Image
import pytest
import skimage.data
import torch

from flowmo_diffusers.metrics.codecs import CODECS, Codec, CodecReconstructor
from flowmo_diffusers.metrics.reconstruction import psnr


LANCZOS = PIL.Image.Resampling.LANCZOS


def photographs(width: int, height: int) -> list[PIL.Image.Image]:
    """Three photographs, reduced."""
    originals = (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee())
    return [PIL.Image.fromarray(pixels).resize((width, height), LANCZOS) for pixels in originals]


def as_images(photos: list[PIL.Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(photo) for photo in photos])).permute(0, 3, 1, 2) / 127.5 - 1


def opened(file: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(file)).convert("RGB"))


def saved(photo: PIL.Image.Image, **options) -> bytes:
    file = io.BytesIO()
    photo.save(file, **options)
    return file.getvalue()


def squared_error(x: PIL.Image.Image, y: PIL.Image.Image) -> float:
    return float(((np.asarray(x, dtype=float) - np.asarray(y, dtype=float)) ** 2).sum())


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("jpeg", {"format": "JPEG", "quality": 30, "optimize": True}),
        ("webp", {"format": "WEBP", "quality": 30, "method": 6}),
    ],
)
def test_at_a_quality_whole_files_are_counted(codec, options):
    """Catches bytes left out of what is called a file, other options than stated, and pixels cut, not rounded."""
    photos = photographs(40, 24)
    reconstructor = CodecReconstructor(codec, quality=30)
    result = reconstructor(as_images(photos) + 0.4 / 127.5, [0, 1, 2])
    files = [saved(photo, **options) for photo in photos]
    assert reconstructor.name == f"{codec}, quality 30"
    assert result.num_bytes.dtype == torch.float64 and result.num_bytes.tolist() == [len(file) for file in files]
    expected = as_images([PIL.Image.fromarray(opened(file)) for file in files])
    assert result.images.dtype == torch.float32 and torch.equal(result.images, expected)
    assert result.indices is None


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("quality", [1, 40, 75, 100])
@pytest.mark.parametrize("size", [(64, 48), (17, 31), (1, 1)])
def test_a_packed_image_is_the_image(codec, quality, size):
    """Catches anything left out of the packed form that cannot be put back: tables, sizes, a byte of padding."""
    for photo in photographs(*size):
        packed = CODECS[codec].pack(photo, quality)
        file = CODECS[codec].encode(photo, quality)
        assert len(packed) < len(file)
        unpacked = CODECS[codec].unpack(packed, size)
        assert np.array_equal(opened(unpacked), opened(file))
        if codec == "webp":
            assert unpacked == file


def test_huffman_tables_are_stored_where_they_save():
    """Catches an image's own tables that are always or never stored."""
    small, large = photographs(32, 32)[0], photographs(192, 192)[0]
    codec = CODECS["jpeg"]
    assert b"\xff\xc4" not in codec.pack(small, 20)
    packed = codec.pack(large, 5)
    assert packed.startswith(b"\x05\xff\xc4")
    standard = saved(large, format="JPEG", quality=5)
    header = standard.index(b"\xff\xda") + 14
    assert len(packed) < 1 + len(standard) - header - 2


@pytest.mark.parametrize("num_bytes", [150, 600])
def test_stored_jpegs_open_by_other_means(num_bytes):
    """Catches stored bytes that only this code can read: here a JPEG file is put together from T.81 by hand."""
    reconstructor = CodecReconstructor("jpeg", num_bytes=num_bytes)
    photos = photographs(48, 32)
    result = reconstructor(as_images(photos), [0, 1, 2])
    for photo, image, size in zip(photos, result.images, result.num_bytes.tolist(), strict=True):
        stored = reconstructor.encode(photo)
        assert len(stored) == size <= num_bytes
        width, height = 48 * stored[0] // 8, 32 * stored[0] // 8
        # Quantization and Huffman tables for this quality, in a stream that has nothing else.
        tables = saved(PIL.Image.new("RGB", (1, 1)), format="JPEG", quality=stored[1], streamtype=1)
        rest = stored[2:]
        own_tables = b""
        while rest.startswith(b"\xff\xc4"):
            length = 2 + struct.unpack(">H", rest[2:4])[0]
            own_tables, rest = own_tables + rest[:length], rest[length:]
        frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes.fromhex("012200021101031101")
        scan = b"\xff\xda" + bytes.fromhex("000c03010002110311003f00")
        file = tables[:-2] + own_tables + frame + scan + rest + b"\xff\xd9"
        decoded = PIL.Image.fromarray(opened(file)).resize((48, 32), LANCZOS)
        assert torch.equal(image, as_images([decoded])[0])


@pytest.mark.parametrize("num_bytes", [150, 600])
def test_stored_webps_open_by_other_means(num_bytes):
    """Catches the same of WebP: here the container is written by hand, with the extended header that ours has not."""
    reconstructor = CodecReconstructor("webp", num_bytes=num_bytes)
    photos = photographs(48, 32)
    result = reconstructor(as_images(photos), [0, 1, 2])
    for photo, image, size in zip(photos, result.images, result.num_bytes.tolist(), strict=True):
        stored = reconstructor.encode(photo)
        assert len(stored) == size <= num_bytes
        width, height = 48 * stored[0] // 8, 32 * stored[0] // 8
        frame = stored[1:4] + b"\x9d\x01\x2a" + struct.pack("<HH", width, height) + stored[4:]
        extended = struct.pack("<4sIIHBHB", b"VP8X", 10, 0, width - 1, 0, height - 1, 0)
        body = b"WEBP" + extended + struct.pack("<4sI", b"VP8 ", len(frame)) + frame + b"\0" * (len(frame) % 2)
        decoded = PIL.Image.fromarray(opened(struct.pack("<4sI", b"RIFF", len(body)) + body)).resize((48, 32), LANCZOS)
        assert torch.equal(image, as_images([decoded])[0])


@pytest.mark.parametrize("codec", CODECS)
def test_more_bytes_make_better_images(codec):
    """Catches budgets that are not used, and an image that is not the best of those that fit."""
    images = as_images(photographs(64, 64))
    budgets = [100, 200, 400, 800, 1600]
    results = [CodecReconstructor(codec, num_bytes=num_bytes)(images, [0, 1, 2]) for num_bytes in budgets]
    quality = [psnr(images, result.images).mean().item() for result in results]
    assert all(better > worse + 1 for worse, better in zip(quality, quality[1:], strict=False))
    for num_bytes, result in zip(budgets, results, strict=True):
        assert result.num_bytes.max() <= num_bytes
        assert result.num_bytes.mean() > 0.9 * num_bytes


@pytest.mark.parametrize("codec", CODECS)
def test_the_best_scale_is_taken(codec):
    """Catches a scale that merely fits, and a search that ends too early, against all scales and qualities."""
    reconstructor = CodecReconstructor(codec, num_bytes=90)
    scales = set()
    for photo in photographs(32, 24):
        errors = {}
        for eighths in range(1, 9):
            small = photo.resize((4 * eighths, 3 * eighths), LANCZOS)
            packed = [CODECS[codec].pack(small, quality) for quality in range(1, 101)]
            if not (fitting := [data for data in packed if len(data) <= 89]):
                continue
            decoded = PIL.Image.fromarray(opened(CODECS[codec].unpack(fitting[-1], small.size)))
            errors[eighths] = squared_error(photo, decoded.resize(photo.size, LANCZOS))
        stored = reconstructor.encode(photo)
        # Not quite equal: of WebP a quality far above may take no more bytes by chance.
        assert squared_error(photo, reconstructor.decode(stored, photo.size)) <= 1.02 * min(errors.values())
        scales.add(stored[0])
    assert min(scales) < 8


class Uneven(Codec):
    """A format whose sizes fall now and then as its quality grows, with a look that tells the quality."""

    packed_form = "quality and as many bytes"

    def version(self) -> str:
        return "1"

    def encode(self, image: PIL.Image.Image, quality: int) -> bytes:
        return self.unpack(self.pack(image, quality), image.size)

    @staticmethod
    def num_bytes(quality: int) -> int:
        return quality - 5 * (quality in (34, 64, 94))

    def pack(self, image: PIL.Image.Image, quality: int) -> bytes:
        return bytes([quality]) * self.num_bytes(quality)

    def unpack(self, packed: bytes, size: tuple[int, int]) -> bytes:
        return saved(PIL.Image.new("RGB", size, (packed[0],) * 3), format="PNG")


@pytest.mark.parametrize("num_bytes", [2, 31, 32, 33, 34, 35, 36, 99, 100, 101, 1000])
def test_the_highest_quality_that_fits_is_found(monkeypatch, num_bytes):
    """Catches a bisection that stops beside the limit, misses the last quality, or trusts sizes to grow."""
    expected = max(quality for quality in range(1, 101) if 1 + Uneven.num_bytes(quality) <= num_bytes)
    monkeypatch.setitem(CODECS, "uneven", Uneven())
    stored = CodecReconstructor("uneven", num_bytes=num_bytes).encode(PIL.Image.new("RGB", (8, 8), "white"))
    assert stored[1] == expected


@pytest.mark.parametrize("codec", CODECS)
def test_images_do_not_depend_on_their_batch(codec):
    """Catches a quality or scale chosen for a batch."""
    images = as_images(photographs(32, 32))
    reconstructor = CodecReconstructor(codec, num_bytes=120)
    together = reconstructor(images, [0, 1, 2])
    alone = [reconstructor(images[i : i + 1], [i]) for i in range(3)]
    assert torch.equal(together.images, torch.cat([result.images for result in alone]))
    assert torch.equal(together.num_bytes, torch.cat([result.num_bytes for result in alone]))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [(96, 64), (64, 2)])
def test_what_cannot_fit_is_refused_with_what_would(codec, size):
    """Catches an image over its budget, a smallest number of bytes that is wrong by one, and sides of 0 pixels."""
    photo = photographs(*size)[0]
    message = f"num_bytes=3 is too small for {codec} of an image of {size[0]} x {size[1]} pixels"
    with pytest.raises(ValueError, match=message) as caught:
        CodecReconstructor(codec, num_bytes=3)(as_images([photo]), [0])
    needed = int(re.search(r"at least (\d+) bytes", str(caught.value))[1])
    stored = CodecReconstructor(codec, num_bytes=needed).encode(photo)
    assert len(stored) == needed and stored[0] == 1
    with pytest.raises(ValueError, match="too small"):
        CodecReconstructor(codec, num_bytes=needed - 1).encode(photo)


def test_settings_say_what_results_depend_on():
    """Catches stored results taken for those of another budget, codec or library, and a rule that is not stated."""
    reconstructors = [
        CodecReconstructor("jpeg", quality=75),
        CodecReconstructor("jpeg", quality=50),
        CodecReconstructor("webp", quality=50),
        CodecReconstructor("jpeg", num_bytes=50),
        CodecReconstructor("webp", num_bytes=576),
    ]
    texts = [json.dumps(reconstructor.settings) for reconstructor in reconstructors]
    assert len(set(texts)) == len({reconstructor.name for reconstructor in reconstructors}) == 5
    assert reconstructors[-1].name == "webp, 576 bytes"
    assert reconstructors[0].settings["counted"] == "whole file"
    assert "scale (1 byte), quality (1 byte)" in reconstructors[3].settings["counted"]
    assert reconstructors[4].settings["library"] == PIL.features.version("webp")
    assert reconstructors[4].settings["pillow"] == PIL.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codec": "png", "quality": 5}, r"codec='png' must be one of \['jpeg', 'webp'\]"),
        ({"codec": "jpeg"}, "exactly one of quality=None and num_bytes=None"),
        ({"codec": "jpeg", "quality": 5, "num_bytes": 5}, "exactly one of quality=5 and num_bytes=5"),
        ({"codec": "jpeg", "quality": 0}, "quality=0 must be a whole number from 1 to 100"),
        ({"codec": "webp", "quality": 101}, "quality=101 must be"),
        ({"codec": "webp", "quality": 7.5}, "quality=7.5 must be"),
        ({"codec": "jpeg", "num_bytes": 0}, "num_bytes=0 must be positive"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CodecReconstructor(**arguments)


@pytest.mark.parametrize("codec", CODECS)
def test_a_library_that_is_not_there(monkeypatch, codec):
    """Catches a run that fails at its first image for want of a codec."""
    monkeypatch.setattr(PIL.features, "version", lambda name: None)
    with pytest.raises(OSError, match=f"Pillow has no {codec}"):
        CodecReconstructor(codec, quality=50)

"""Any file that PIL knows becomes upright RGB pixels, or is refused with a reason; nothing else comes out of it."""

import io
import struct
import warnings
import zlib

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest

from flowmo_diffusers.data.decoding import IMAGE_EXTENSIONS, BadImage, decode_image


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: PIL.Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def decoded(file) -> np.ndarray:
    image = decode_image(file)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (40, 30)])
def test_jpeg(tmp_path, size):
    """Catches pixels other than PIL's own, from bytes, a path or a path as text."""
    data = encode(PIL.Image.fromarray(noise(*size)), "JPEG", quality=90)
    (tmp_path / "image.jpg").write_bytes(data)
    expected = np.asarray(PIL.Image.open(io.BytesIO(data)))
    for file in (data, tmp_path / "image.jpg", str(tmp_path / "image.jpg")):
        assert np.array_equal(decoded(file), expected)


LOSSLESS = ["BMP", "DIB", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF"]


@pytest.mark.parametrize("format", [*LOSSLESS, "AVIF", "DDS", "GIF", "ICO", "JPEG2000", "MPO", "WEBP"])
def test_formats(format):
    """Catches a format that PIL reads and we do not; one colour survives even the lossy ones."""
    if format in ("AVIF", "WEBP") and not PIL.features.check(format.lower()):
        pytest.skip(f"this PIL lacks {format}")
    size = (64, 64) if format in ("DDS", "ICO") else (40, 30)
    pixels = noise(*size) if format in LOSSLESS else np.full((*size[::-1], 3), (192, 64, 32), np.uint8)
    result = decoded(encode(PIL.Image.fromarray(pixels), format)).astype(int)
    assert result.shape == pixels.shape and np.abs(result - pixels).max() <= (0 if format in LOSSLESS else 4)


def test_extensions():
    """Catches an extension that is lost, or a format that PIL hands to other programs."""
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif", ".jp2", ".ppm"} <= IMAGE_EXTENSIONS
    assert not {".eps", ".ps", ".wmf", ".mpg", ".h5", ".pdf", ".txt", ".tar"} & IMAGE_EXTENSIONS


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(9))
def test_exif_orientation(format, orientation):
    """Catches a camera's image that lies on its side or is mirrored, and one that is turned twice (TIFF)."""
    upright = PIL.Image.fromarray(noise(5, 3))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(upright, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    # The eight ways as the EXIF standard has them: where the stored first row and column are seen.
    pixels = np.asarray(upright)
    turned = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }
    assert np.array_equal(decoded(data), turned.get(orientation, pixels))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_damaged_exif(format):
    """Catches a good image that is lost for its metadata, or PIL's warnings of them in the log."""
    image = PIL.Image.fromarray(noise(16, 16))
    expected = decoded(encode(image, format))
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff"):
        data = encode(image, format, exif=exif)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert np.array_equal(decoded(data), expected)
        assert not caught


def test_cmyk():
    """Catches inks taken for light: Adobe's JPEGs store them inverted."""
    for color in (RED, GREEN, BLUE, WHITE, (0, 0, 0)):
        image = PIL.Image.new("RGB", (16, 16), color).convert("CMYK")
        for format in ("JPEG", "TIFF"):
            assert np.abs(decoded(encode(image, format)).astype(int) - color).max() <= 2


def test_palette():
    """Catches palette numbers taken for greys, and a transparent colour that shows."""
    image = PIL.Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    assert decoded(encode(image, "PNG"))[0].tolist() == [[*RED], [*GREEN], [*BLUE]]
    for format in ("PNG", "GIF"):
        assert decoded(encode(image, format, transparency=1))[0].tolist() == [[*RED], [*WHITE], [*BLUE]]
    half = decoded(encode(image, "PNG", transparency=bytes([255, 0, 51])))[0]
    assert half.tolist() == [[*RED], [*WHITE], [204, 204, 255]]


def test_alpha_is_on_white():
    """Catches colours hidden under transparency, which nobody ever saw."""
    rgba = PIL.Image.new("RGBA", (4, 1))
    rgba.putdata([(*RED, 255), (*RED, 0), (*RED, 51), (0, 0, 0, 128)])
    expected = [[255, 0, 0], [255, 255, 255], [255, 204, 204], [127, 127, 127]]
    for format in ("PNG", "TIFF"):
        assert decoded(encode(rgba, format))[0].tolist() == expected
    la = PIL.Image.new("LA", (3, 1))
    la.putdata([(0, 255), (0, 0), (0, 51)])
    assert decoded(encode(la, "PNG"))[0, :, 0].tolist() == [0, 255, 204]
    key = PIL.Image.fromarray(np.array([[RED, GREEN]], np.uint8))
    assert decoded(encode(key, "PNG", transparency=GREEN))[0].tolist() == [[*RED], [*WHITE]]


def test_one_bit_and_grey():
    """Catches bits 0 and 1 taken for black and almost black."""
    bits = PIL.Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
    assert decoded(encode(bits, "PNG"))[0].tolist() == [[0] * 3, [255] * 3, [0] * 3]
    assert decoded(encode(PIL.Image.new("L", (1, 1), 77), "PNG"))[0].tolist() == [[77] * 3]


@pytest.mark.parametrize(
    ["dtype", "format"], [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<u2", "PPM"), ("<i4", "TIFF")]
)
def test_16_bit_grey(dtype, format):
    """Catches 16-bit greys clipped to white, with either byte order and in PIL's 32-bit mode."""
    values = np.array([[0, 255, 256, 1000, 32768, 65535]])
    data = encode(PIL.Image.fromarray(values.astype(dtype)), format)
    assert decoded(data)[0, :, 0].tolist() == [0, 0, 1, 3, 128, 255]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation(format):
    """Catches another frame than the first."""
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(decoded(data).astype(int) - RED).max() <= 2


@pytest.mark.parametrize("format", ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(format, share):
    """Catches half an image that is trained on, its rest grey or black."""
    data = encode(PIL.Image.fromarray(noise(64, 48)), format)
    decode_image(data)
    with pytest.raises(BadImage, match="."):
        decode_image(data[: int(share * len(data))])


@pytest.mark.parametrize(
    ["file", "reason"],
    [
        (b"", "empty"),
        (b"no image at all", "no image of a known format"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
            "no image of a known format",
        ),
        ("nowhere.png", "FileNotFoundError"),
        (encode(PIL.Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
        (encode(PIL.Image.fromarray(np.array([[70_000]], np.int32)), "TIFF"), "32-bit"),
        (encode(PIL.Image.fromarray(np.array([[-1]], np.int32)), "TIFF"), "32-bit"),
    ],
)
def test_refused(file, reason):
    """Catches nonsense that is decoded, a reason that does not tell, and a file that starts another program (EPS)."""
    with pytest.raises(BadImage, match=reason):
        decode_image(file)


def png_header(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, all of which are missing behind the first chunk's head."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\1\0IDAT"


@pytest.mark.parametrize("side", [9_500, 12_000, 60_000])
def test_decompression_bomb(side):
    """Catches memory taken for what a header promises, and PIL's warning of it (below twice its limit) as an error of
    another kind or as noise in the log."""
    assert side**2 > PIL.Image.MAX_IMAGE_PIXELS
    for action in ("error", "always"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter(action)
            with pytest.raises(BadImage, match="bomb"):
                decode_image(png_header(side, side))
        assert not caught
    with pytest.raises(BadImage, match="truncated|broken"):
        decode_image(png_header(100, 100))


def test_limit_is_pillows(monkeypatch):
    """Catches an image refused that a person allowed by PIL's own switch, and one of exactly the limit refused."""
    data = encode(PIL.Image.new("RGB", (10, 10)), "PNG")
    for limit, good in ((99, False), (100, True), (None, True)):
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
        if good:
            decode_image(data)
        else:
            with pytest.raises(BadImage, match="bomb"):
                decode_image(data)


@pytest.mark.parametrize(
    "format", ["AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "QOI", "TIFF"]
)
def test_damage_has_one_exception(format, monkeypatch):
    """Catches what PIL's readers throw at damaged files (IndexError, struct.error ...) ending a run, and their
    warnings filling the log."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10_000)
    generator = np.random.default_rng(1)
    data = np.frombuffer(encode(PIL.Image.fromarray(noise(24, 20)), format), np.uint8)
    outcomes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            damaged = data.copy()
            places = generator.integers(
                0, min(len(data), generator.choice([40, 400, 4000])), 1 + generator.integers(4)
            )
            damaged[places] = generator.integers(0, 256, len(places))
            try:
                outcomes.add(decode_image(damaged.tobytes()).mode)
            except BadImage as error:
                outcomes.add(type(error))
    assert outcomes == {"RGB", BadImage}

"""What is measured is what the usual tools measure, image by image."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from flowmo_diffusers.metrics.pictures import labelled_rows
from flowmo_diffusers.metrics.reconstruction import psnr, to_uint8


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Four images from random pixels, and copies that are worse and worse."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 24, 16, generator=generator) * 2 - 1
    noise = torch.randn(x.shape, generator=generator) * torch.tensor([0.01, 0.05, 0.2, 1.0])[:, None, None, None]
    return x, x + noise


def test_to_uint8():
    """Catches truncation instead of rounding, and overflow of what lies outside the range."""
    values = torch.arange(256) / 127.5 - 1
    assert to_uint8(values).tolist() == list(range(256))
    assert to_uint8(values + 0.4 / 127.5).tolist() == list(range(256))
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    assert to_uint8(values.bfloat16()).dtype == torch.uint8


def test_psnr_equals_scikit_image(pairs):
    """Catches a ratio over the whole batch, over unrounded pixels or over another peak."""
    x, y = pairs
    expected = [
        peak_signal_noise_ratio(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy(), data_range=255)
        for a, b in zip(to_uint8(x), to_uint8(y), strict=True)
    ]
    result = psnr(x, y)
    assert result.shape == (4,) and expected[0] > expected[-1] + 20
    assert result.tolist() == pytest.approx(expected, rel=1e-6)
    assert [psnr(a[None], b[None]).item() for a, b in zip(x, y, strict=True)] == result.tolist()


def test_psnr_of_equal_images(pairs):
    """Catches an equal image that is no number or spoils the images beside it."""
    x, y = pairs
    y[1] = x[1]
    result = psnr(x, y)
    assert result.isinf().tolist() == [False, True, False, False] and result[1] > 0


def test_psnr_refuses_unequal_shapes(pairs):
    """Catches one original that is broadcast over a batch of reconstructions."""
    x, y = pairs
    with pytest.raises(ValueError, match=r"must have one shape, not \(1, 3, 24, 16\) and \(4, 3, 24, 16\)"):
        psnr(x[:1], y)


def test_labelled_rows():
    """Catches tiles that lie over labels or each other, are shown in another place, or are smoothed when enlarged."""
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.rand(n, 3, 8, 16, generator=generator) * 2 - 1 for name, n in (("original", 3), ("ours", 2))}
    picture = labelled_rows(rows, side=24)
    assert picture.size == (6 + 3 * (48 + 6), 6 + 2 * (24 + 24 + 6))  # tiles of 48 x 24, labels of 24, margins of 6
    pixels = np.asarray(picture).copy()
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy()):
            top, left = 6 + row * 54 + 24, 6 + column * 54
            tile = pixels[top : top + 24, left : left + 48]
            assert np.array_equal(tile, image.repeat(3, axis=0).repeat(3, axis=1)), (row, column)
            tile[:] = 255
    for row in range(2):
        label = pixels[6 + row * 54 : 6 + row * 54 + 24]
        assert (label < 128).any()
        label[:] = 255
    assert (pixels == 255).all()


def test_labelled_rows_of_large_images():
    """Catches images larger than their tile that are cut off instead of shrunk, or shrunk without smoothing."""
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    pixels = np.asarray(labelled_rows({"stripes": stripes}, side=16))[30:46, 6:22]
    assert abs(pixels[:, 2:-2].astype(int) - 127).max() < 16

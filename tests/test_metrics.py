"""What is measured is what the usual tools measure, image by image."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from flowmo_diffusers.metrics.pictures import labelled_rows
from flowmo_diffusers.metrics.reconstruction import (
    mean_psnr,
    mean_squared_error,
    pixels,
    psnr,
    psnr_over_batches,
    round_images,
    ssim,
    to_uint8,
)


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
    assert result.tolist() == pytest.approx(expected, rel=0, abs=1e-6)
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


def test_roundings():
    """Catches 8-bit images that change when truncated, or float pixels that are rounded or not clipped."""
    values = torch.arange(256) / 127.5 - 1
    between = values[:-1] + 0.9 / 127.5
    for rounding in ("nearest", "truncate", "float"):
        assert pixels(values, rounding).tolist() == list(range(256))
        torch.testing.assert_close(round_images(values, rounding), values, rtol=0, atol=1e-7)
    assert to_uint8(between, "truncate").tolist() == list(range(255))
    assert to_uint8(between, "nearest").tolist() == list(range(1, 256))
    torch.testing.assert_close(pixels(between, "float"), torch.arange(255) + 0.9, rtol=0, atol=1e-4)
    assert pixels(torch.tensor([-3.0, 3.0]), "float").tolist() == [0, 255]
    assert round_images(between, "truncate").dtype == torch.float32
    torch.testing.assert_close(round_images(between, "truncate"), values[:-1], rtol=0, atol=1e-7)


def test_unknown_roundings_are_refused(pairs):
    """Catches a misspelt rounding that means another one."""
    for function in (psnr, ssim, mean_squared_error):
        with pytest.raises(ValueError, match="rounding='floor' must be one of nearest, truncate, float"):
            function(*pairs, "floor")
    with pytest.raises(ValueError, match="gives no 8-bit values"):
        to_uint8(pairs[0], "float")


def test_errors_of_unrounded_and_truncated_pixels(pairs):
    """Catches a rounding that is not handed on, for an image or its original."""
    x, y = (images.double().clamp(-1, 1) * 127.5 + 127.5 for images in pairs)
    expected = {
        "float": (x - y).square().mean((1, 2, 3)),
        "truncate": (x.floor() - y.floor()).square().mean((1, 2, 3)),
        "nearest": (x.round() - y.round()).square().mean((1, 2, 3)),
    }
    for rounding, errors in expected.items():
        torch.testing.assert_close(mean_squared_error(*pairs, rounding), errors, rtol=1e-6, atol=0)
        torch.testing.assert_close(psnr(*pairs, rounding), 10 * (255**2 / errors).log10(), rtol=1e-6, atol=0)


def test_mixed_dtypes(pairs):
    """Catches a reconstruction in bfloat16 that lowers the precision of what it is compared with."""
    x, y = pairs[0], pairs[1].bfloat16()
    for function in (psnr, ssim):
        assert torch.equal(function(x, y), function(x, y.float()))


def test_mean_psnr(caplog):
    """Catches an image equal to its original that makes the mean infinite, or is left out without a word."""
    errors = torch.tensor([0.0, 650.25, 65.025, 0.0], dtype=torch.float64)
    mean, equal = mean_psnr(errors)
    assert mean == pytest.approx(25) and equal == 2
    assert "2 of 4 images equal their originals" in caplog.text
    caplog.clear()
    assert mean_psnr(errors[1:3]) == (pytest.approx(25), 0)
    assert not caplog.text
    assert mean_psnr(errors[:1]) == (float("inf"), 1)
    with pytest.raises(ValueError, match="empty"):
        mean_psnr(errors[:0])


def test_psnr_over_batches_equals_scikit_image_on_batches():
    """Catches means of means, a last batch that is dropped, or a PSNR of images."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(7, 3, 8, 8, generator=generator) * 2 - 1
    y = x + torch.randn(x.shape, generator=generator) * torch.logspace(-2, 0, 7)[:, None, None, None]
    a, b = to_uint8(x, "truncate").numpy(), to_uint8(y, "truncate").numpy()
    expected = [peak_signal_noise_ratio(a[i : i + 3], b[i : i + 3], data_range=255) for i in range(0, 7, 3)]
    errors = mean_squared_error(x, y, "truncate")
    assert psnr_over_batches(errors, 3) == pytest.approx(np.mean(expected), abs=1e-6)
    assert psnr_over_batches(errors, 1) == pytest.approx(psnr(x, y, "truncate").mean().item())
    assert psnr_over_batches(errors) < psnr(x, y, "truncate").mean()
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        psnr_over_batches(errors, 0)
    with pytest.raises(ValueError, match="empty"):
        psnr_over_batches(errors[:0])


def smooth(pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright images of little contrast beside noisy ones, to tell luminance, contrast and structure apart."""
    x, y = pairs
    ramp = torch.linspace(0.5, 0.9, 16).expand(1, 3, 24, 16)
    return torch.cat([x, ramp, ramp]), torch.cat([y, ramp - 0.1, ramp.flip(-1)])


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "float"])
def test_ssim_equals_scikit_image(pairs, rounding):
    """Catches a Gaussian window, the population covariance, borders that count, or other constants."""
    x, y = smooth(pairs)
    expected = [
        structural_similarity(a.double().numpy(), b.double().numpy(), data_range=255, channel_axis=0)
        for a, b in zip(pixels(x, rounding), pixels(y, rounding), strict=True)
    ]
    result = ssim(x, y, rounding)
    assert max(expected) > 0.9 and min(expected) < 0.1
    assert result.tolist() == pytest.approx(expected, rel=0, abs=1e-6)
    assert torch.equal(ssim(x, x), torch.ones(6, dtype=torch.float64))


def test_ssim_of_the_smallest_image(pairs):
    """Catches a window that needs a border, or an image too small for it that gives no number."""
    x, y = (images[..., :7, :7] for images in pairs)
    a, b = to_uint8(x[0]).numpy(), to_uint8(y[0]).numpy()
    assert ssim(x, y)[0].item() == pytest.approx(structural_similarity(a, b, data_range=255, channel_axis=0), abs=1e-6)
    with pytest.raises(ValueError, match=r"\(6, 7\) are smaller than SSIM's window of 7"):
        ssim(x[..., :6, :], y[..., :6, :])


def test_images_that_are_no_numbers_are_refused(pairs):
    """Catches a diverged model whose pixels are clipped and then measured as if they were an image."""
    x, y = pairs
    for function in (psnr, ssim, mean_squared_error):
        for value in (float("nan"), float("inf")):
            bad = y.clone()
            bad[2, 1, 3, 4] = value
            with pytest.raises(ValueError, match="images y have values that are not finite"):
                function(x, bad)
            with pytest.raises(ValueError, match="images x have values that are not finite"):
                function(bad, x)
        with pytest.raises(ValueError, match="one shape"):
            function(x, y[:, :1])
        with pytest.raises(ValueError, match=r"it must be \(b, c, h, w\)"):
            function(x[0], y[0])


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

"""How close reconstructions are to their originals."""

import logging

import torch
import torch.nn.functional as F


logger = logging.getLogger(__name__)

ROUNDINGS = ("nearest", "truncate", "float")
SSIM_WINDOW = 7  # side in pixels


def pixels(images: torch.Tensor, rounding: str = "nearest") -> torch.Tensor:
    """
    Images in [-1, 1] to pixel values in [0, 255], as floats.

    Args:
        images: Of any shape; what lies outside the range is clipped to it.
        rounding: "nearest", the 8-bit values of a well-saved picture; "truncate", those of a plain cast to 8 bits,
            half a level darker on average; "float", not rounded.

    Raises:
        ValueError: If the rounding is unknown.
    """
    values = images.float().clamp(-1, 1) * 127.5 + 127.5  # in this order whole values come back whole
    if rounding == "nearest":
        return values.round()
    if rounding == "truncate":
        return values.floor()
    if rounding == "float":
        return values
    raise ValueError(f"rounding={rounding!r} must be one of {', '.join(ROUNDINGS)}")


def to_uint8(images: torch.Tensor, rounding: str = "nearest") -> torch.Tensor:
    """Images in [-1, 1] to the 8-bit values a saved picture holds, by "nearest" or "truncate" of [`pixels`]."""
    if rounding == "float":
        raise ValueError("rounding='float' gives no 8-bit values: it must be 'nearest' or 'truncate'")
    return pixels(images, rounding).to(torch.uint8)


def round_images(images: torch.Tensor, rounding: str = "nearest") -> torch.Tensor:
    """Images in [-1, 1] as they come back from pixel values that were rounded by [`pixels`], float32 in [-1, 1]."""
    return pixels(images, rounding) / 127.5 - 1


def mean_squared_error(x: torch.Tensor, y: torch.Tensor, rounding: str = "nearest") -> torch.Tensor:
    """
    Mean squared difference of the pixel values of each image, in [0, 255²].

    Args:
        x: Originals (b, c, h, w) in [-1, 1].
        y: Reconstructions, likewise.
        rounding: Of [`pixels`].

    Returns:
        (b,), float64 where the device has it.

    Raises:
        ValueError: If the shapes differ, or values are not finite.
    """
    _check(x, y)
    difference = _exact(pixels(x, rounding)) - _exact(pixels(y, rounding))
    return difference.square().mean(dim=(1, 2, 3))


def psnr_of(squared_errors: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors of pixel values in [0, 255]; infinite where one is 0."""
    return 10 * torch.log10(255.0**2 / squared_errors)


def psnr(x: torch.Tensor, y: torch.Tensor, rounding: str = "nearest") -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB, infinite where two images are equal; see
    [`mean_squared_error`]."""
    return psnr_of(mean_squared_error(x, y, rounding))


def mean_psnr(squared_errors: torch.Tensor) -> tuple[float, int]:
    """
    Mean PSNR over images, and how many have none because they equal their originals (a blank picture in a lossless
    corner of a codec). One of these would make the mean infinite, so it is taken over the others; a warning says so.

    Args:
        squared_errors: (n,), of [`mean_squared_error`].

    Returns:
        The mean in dB, infinite if all images equal their originals, and their number.

    Raises:
        ValueError: If there are no images.
    """
    _check_count(squared_errors)
    differing = squared_errors[squared_errors > 0]
    equal = len(squared_errors) - len(differing)
    if equal:
        logger.warning(
            f"{equal} of {len(squared_errors)} images equal their originals, so that their PSNR is infinite; the mean "
            "is over the others"
        )
    return (psnr_of(differing).mean().item() if len(differing) else float("inf")), equal


def psnr_over_batches(squared_errors: torch.Tensor, batch_size: int = 5) -> float:
    """
    The figure that published evaluations report which call a PSNR of single images with whole batches: the PSNR of the
    mean error of each batch, averaged over batches. FlowMo's (arXiv 2503.11056) takes batches of 5 and pixels by
    "truncate". It depends on the batch size and on the order of images, and is below the mean over images.

    Args:
        squared_errors: (n,), of [`mean_squared_error`], in the order of the data set.
        batch_size: Consecutive images of a batch; the last may have fewer.

    Returns:
        In dB; infinite if all images of a batch equal their originals.

    Raises:
        ValueError: If there are no images, or `batch_size` is not positive.
    """
    _check_count(squared_errors)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    means = torch.stack([batch.mean() for batch in squared_errors.split(batch_size)])
    return psnr_of(means).mean().item()


def ssim(x: torch.Tensor, y: torch.Tensor, rounding: str = "nearest") -> torch.Tensor:
    """
    Structural similarity of each image (Wang et al. 2004, equation 13, with K1 = 0.01 and K2 = 0.03), as scikit-image
    has it by default: in uniform windows of 7 x 7 pixels with the sample covariance, averaged over channels and over
    the windows that lie wholly inside the image.

    Args:
        x: Originals (b, c, h, w) in [-1, 1], at least 7 x 7 pixels.
        y: Reconstructions, likewise.
        rounding: Of [`pixels`].

    Returns:
        (b,) in [-1, 1], 1 for equal images; float64 where the device has it.

    Raises:
        ValueError: If the shapes differ, images are smaller than the window, or values are not finite.
    """
    _check(x, y)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"images of (h, w) = {tuple(x.shape[-2:])} are smaller than SSIM's window of {SSIM_WINDOW} pixels"
        )
    x, y = _exact(pixels(x, rounding)), _exact(pixels(y, rounding))
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    variances = sample * (_window_mean(x * x + y * y) - mean_x**2 - mean_y**2)
    covariance = sample * (_window_mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _window_mean(values: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(values, SSIM_WINDOW, stride=1)


def _exact(values: torch.Tensor) -> torch.Tensor:
    return values if values.device.type == "mps" else values.double()  # Apple's GPUs have no float64


def _check(x: torch.Tensor, y: torch.Tensor) -> None:
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(
            f"x and y must have one shape, not {tuple(x.shape)} and {tuple(y.shape)}; it must be (b, c, h, w)"
        )
    for name, images in (("x", x), ("y", y)):
        if not images.isfinite().all():
            raise ValueError(f"images {name} have values that are not finite")


def _check_count(squared_errors: torch.Tensor) -> None:
    if not len(squared_errors):
        raise ValueError("squared_errors are empty: there are no images to average over")

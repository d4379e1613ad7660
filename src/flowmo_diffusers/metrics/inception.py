"""
The Inception-v3 that FID is defined by (Heusel et al. 2017, arXiv 1706.08500): TensorFlow's of 2015-12-05, whose
average pools do not count padding and whose last block has a maximum pool. Modules are named as in torchvision, so
that the converted weights in circulation load by name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


SIZE = 299  # side of the input in pixels
POOL_DIMS = 2048
NUM_CLASSES = 1008
# sFID (Nash et al. 2021, arXiv 2103.03841, as guided-diffusion evaluates it): the first channels of a 17 x 17 map.
SPATIAL_CHANNELS = 7


class Conv(nn.Module):
    """Convolution, normalisation by stored statistics, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int | tuple[int, int], **options):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel_size, bias=False, **options)
        self.bn = nn.BatchNorm2d(channels_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """35 x 35."""

    def __init__(self, channels: int, pool_channels: int):
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1 = Conv(channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        )
        return torch.cat(branches, 1)


class InceptionB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            F.max_pool2d(x, 3, stride=2),
        )
        return torch.cat(branches, 1)


class InceptionC(nn.Module):
    """17 x 17."""

    def __init__(self, width: int):
        super().__init__()
        row, column = {"kernel_size": (1, 7), "padding": (0, 3)}, {"kernel_size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, width, 1)
        self.branch7x7_2 = Conv(width, width, **row)
        self.branch7x7_3 = Conv(width, 192, **column)
        self.branch7x7dbl_1 = Conv(768, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, **column)
        self.branch7x7dbl_3 = Conv(width, width, **row)
        self.branch7x7dbl_4 = Conv(width, width, **column)
        self.branch7x7dbl_5 = Conv(width, 192, **row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = (
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool(x)),
        )
        return torch.cat(branches, 1)


class InceptionD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
            F.max_pool2d(x, 3, stride=2),
        )
        return torch.cat(branches, 1)


class InceptionE(nn.Module):
    """8 x 8, with an average or (in the last block) a maximum pool."""

    def __init__(self, channels: int, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else average_pool(x)
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        )
        return torch.cat(branches, 1)


class FIDInception(nn.Module):
    """
    Args:
        classifier: Whether there is a last layer, for [`~FIDInception.probabilities`].
    """

    def __init__(self, classifier: bool = True):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(128)
        self.Mixed_6c = InceptionC(160)
        self.Mixed_6d = InceptionC(160)
        self.Mixed_6e = InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, max_pool=False)
        self.Mixed_7c = InceptionE(2048, max_pool=True)
        self.fc = nn.Linear(POOL_DIMS, NUM_CLASSES) if classifier else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: (b, 3, 299, 299) in [-1, 1].

        Returns:
            What FID compares (b, 2048), and what sFID compares (b, 7 x 17 x 17): the first channels of the first
            branch of the block that TensorFlow calls mixed_6.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :SPATIAL_CHANNELS].flatten(1)  # branches are concatenated, the first one first
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean((2, 3)), spatial

    def probabilities(self, pool: Tensor) -> Tensor:
        """
        Of the classes (b, 1008), as the Inception Score is computed: without the last layer's bias.

        Args:
            pool: (b, 2048), from `forward`.
        """
        return F.linear(pool, self.fc.weight).softmax(1)


def resize_as_tensorflow(images: Tensor, size: int = SIZE) -> Tensor:
    """
    Bilinear as TensorFlow 1 did it: pixel i of the result is taken at i * (old size / new size), without smoothing.

    Args:
        images: (b, c, h, w).
    """
    rows, row_shares = _source_pixels(images.shape[2], size, images.device)
    columns, column_shares = _source_pixels(images.shape[3], size, images.device)
    top, bottom = images[:, :, rows[0]], images[:, :, rows[1]]
    images = top + (bottom - top) * row_shares[:, None]
    left, right = images[..., columns[0]], images[..., columns[1]]
    return left + (right - left) * column_shares


def _source_pixels(old: int, new: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two pixels for each new one, and the share of the second."""
    places = torch.arange(new, dtype=torch.float32, device=device) * (old / new)
    first = places.long()
    return (first, (first + 1).clamp(max=old - 1)), places - first

"""The Fréchet distance between features of two sets of images: FID where the features are Inception's."""

import logging

import torch


logger = logging.getLogger(__name__)


class Moments:
    """
    Mean and covariance of features, of which any number may pass by: only these two are kept, on the CPU in float64.

    Batches are joined by the update of Chan, Golub and LeVeque (1979), which loses no digits where the mean is
    large beside the spread; their order and sizes matter up to rounding only.

    Args:
        dims: Length d of a feature.
    """

    def __init__(self, dims: int):
        self.count: int | None = 0
        self.mean = torch.zeros(dims, dtype=torch.float64)
        self._scatter = torch.zeros(dims, dims, dtype=torch.float64)  # sum of outer products of deviations

    @classmethod
    def from_statistics(cls, mean: torch.Tensor, covariance: torch.Tensor, count: int | None = None) -> "Moments":
        """
        Moments that were measured before.

        Args:
            mean: (d,).
            covariance: (d, d), the unbiased one.
            count: Of how many features; `None` where it is not known, and then none can be added.

        Raises:
            ValueError: If shapes do not fit, values are not finite, the covariance is not symmetric, or the count is
                below 2.
        """
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean and covariance have shapes {tuple(mean.shape)} and {tuple(covariance.shape)}; "
                "expected (d,) and (d, d)"
            )
        if not mean.isfinite().all() or not covariance.isfinite().all():
            raise ValueError("mean or covariance have values that are not finite")
        if not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * covariance.abs().max().item()):
            raise ValueError("covariance is not symmetric")
        if count is not None and count < 2:
            raise ValueError(f"count={count} must be at least 2: fewer features have no covariance")
        moments = cls(0)
        moments.count = count
        moments.mean = mean.double().cpu()
        moments._scatter = covariance.double().cpu() * moments._degrees
        return moments

    @property
    def dims(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> torch.Tensor:
        """(d, d) float64, unbiased: divided by count - 1. `ValueError` if there are fewer than 2 features."""
        if self.count is not None and self.count < 2:
            raise ValueError(f"the covariance of {self.count} features is not defined: at least 2 are needed")
        return self._scatter / self._degrees

    @property
    def _degrees(self) -> int:
        return 1 if self.count is None else self.count - 1

    def add(self, features: torch.Tensor) -> None:
        """
        Args:
            features: (n, d), of any floating type; large n are faster.

        Raises:
            ValueError: If the shape does not fit, values are not finite, or the count so far is not known.
        """
        if features.ndim != 2 or features.shape[1] != self.dims:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected (n, {self.dims})")
        if not features.isfinite().all():
            raise ValueError("features have values that are not finite")
        if not len(features):
            return
        features = features.detach().double().cpu()
        mean = features.mean(0)
        centred = features - mean
        self._join(len(features), mean)
        self._scatter.addmm_(centred.T, centred)

    def merge(self, other: "Moments") -> None:
        """
        Takes in what others, such as another process, have counted.

        Raises:
            ValueError: If the features differ in length, or one of the counts is not known.
        """
        _check_dims(self, other)
        if other.count is None:
            raise ValueError("other has no count: moments of an unknown number of features cannot be joined")
        if other.count:
            self._join(other.count, other.mean)
            self._scatter += other._scatter

    def _join(self, count: int, mean: torch.Tensor) -> None:
        """Mean, count, and the scatter that two sets have because their means differ."""
        if self.count is None:
            raise ValueError("nothing can be added to moments of an unknown number of features")
        total = self.count + count
        difference = mean - self.mean
        self._scatter.addr_(difference, difference, alpha=self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total


def frechet_distance(a: Moments, b: Moments) -> float:
    """
    |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^1/2), the squared 2-Wasserstein distance of two Gaussians (Dowson and
    Landau 1982; of Inception's features it is FID, Heusel et al. 2017, arXiv 1706.08500, equation 6).

    With C = F F^T the trace of (C_a C_b)^1/2 is the sum of the singular values of F_a^T F_b. So no root of a product
    is taken, which would lose half of the digits where covariances are singular.

    A covariance of fewer than d + 1 features is singular, and the distance then says more of their number than of the
    images: a warning tells the numbers.

    Raises:
        ValueError: If the features differ in length, or there are fewer than 2 of them.
    """
    _check_dims(a, b)
    for moments in (a, b):
        if moments.count is not None and moments.count <= moments.dims:
            logger.warning(
                f"only {moments.count} images for {moments.dims} features: their covariance is singular and the "
                f"Fréchet distance says little; at least {moments.dims + 1} images are needed, better many more"
            )
    covariance_a, covariance_b = a.covariance, b.covariance
    overlap = torch.linalg.svdvals(_factor(covariance_a).T @ _factor(covariance_b)).sum()
    distance = (a.mean - b.mean).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """F (d, d) with F F^T = covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def _check_dims(a: Moments, b: Moments) -> None:
    if a.dims != b.dims:
        raise ValueError(
            f"features of length {a.dims} and {b.dims} cannot be compared: they are of different networks"
        )

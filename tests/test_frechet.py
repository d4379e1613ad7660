"""FID's formula: equal to the plain one where that can be computed, and right where it cannot."""

import numpy as np
import pytest
import scipy.linalg
import torch
from fidelity import fidelity_module

from flowmo_diffusers.metrics.frechet import Moments, frechet_distance


def features(count: int, dims: int = 24, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Correlated float32 features, like Inception's not negative."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dims, dims, generator=torch.Generator().manual_seed(99)) / dims**0.5
    return (torch.randn(count, dims, generator=generator) @ mixing + shift).relu()


def moments(*batches: torch.Tensor) -> Moments:
    result = Moments(batches[0].shape[1])
    for batch in batches:
        result.add(batch)
    return result


def plain_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The formula as it is written, with a root of the product of the covariances."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * root)


# Moments


def test_moments_are_numpys():
    """Catches a biased covariance."""
    x = features(100).double()
    result = moments(x)
    assert result.count == 100 and result.dims == 24
    np.testing.assert_allclose(result.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-14)
    assert result.covariance.dtype == torch.float64


def test_batches_and_their_order_do_not_matter():
    """Catches a cross term that is missing or wrong when batches of different means are joined."""
    x = features(101) + torch.arange(101)[:, None]
    whole = moments(x)
    for parts in (x.split(7), x.flip(0).split(1), [x[:0], x[50:], x[:50]]):
        result = moments(*parts)
        assert result.count == 101
        torch.testing.assert_close(result.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


def test_merged_moments_are_those_of_all():
    """Catches processes whose counts are not weighted, or one without images that spoils the others."""
    x = features(90) + torch.arange(90)[:, None]
    result, other = moments(x[:20]), moments(x[20:])
    result.merge(Moments(24))
    result.merge(other)
    torch.testing.assert_close(result.covariance, moments(x).covariance, rtol=1e-12, atol=1e-12)
    assert result.count == 90 and other.count == 70
    empty = Moments(24)
    empty.merge(Moments(24))
    empty.merge(other)
    assert torch.equal(empty.mean, other.mean)
    empty.add(x[:20])
    torch.testing.assert_close(other.covariance, moments(x[20:]).covariance)  # not shared


def test_large_means_do_not_cancel():
    """Catches E[x x^T] - m m^T, or sums in float32, which lose a spread that is small beside the mean."""
    x = features(200).double()
    torch.testing.assert_close(moments(*(x + 1e6).split(32)).covariance, moments(x).covariance, rtol=1e-6, atol=1e-8)
    shifted = moments(*(features(200) + 4096).split(32)).covariance
    np.testing.assert_allclose(
        shifted, np.cov((features(200) + 4096).double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12
    )


def test_low_precision_features_are_summed_in_high():
    """Catches sums in the features' own type, and gradients that are kept through all batches."""
    x = features(64).bfloat16().requires_grad_()
    result = moments(x)
    torch.testing.assert_close(result.covariance, moments(x.detach().double()).covariance)
    assert not result.covariance.requires_grad


def test_statistics_from_elsewhere():
    """Catches a covariance scaled by the count, or statistics that change the caller's arrays when more is added."""
    x, y = features(80), features(40, seed=1)
    known = moments(x)
    mean, covariance = known.mean.float(), known.covariance.float()
    before = covariance.clone()
    again = Moments.from_statistics(mean, covariance, 80)
    again.add(y)
    torch.testing.assert_close(again.covariance, moments(x, y).covariance, rtol=1e-5, atol=1e-6)
    assert torch.equal(covariance, before)
    unknown = Moments.from_statistics(mean, covariance)
    torch.testing.assert_close(unknown.covariance, covariance.double())
    assert unknown.count is None
    assert frechet_distance(unknown, moments(y)) == pytest.approx(frechet_distance(known, moments(y)), rel=1e-5)
    with pytest.raises(ValueError, match="unknown number"):
        unknown.add(y)
    with pytest.raises(ValueError, match="unknown number"):
        moments(y).merge(unknown)


@pytest.mark.parametrize(
    ("mean", "covariance", "count", "message"),
    [
        (torch.zeros(3), torch.eye(4), 9, r"shapes \(3,\) and \(4, 4\)"),
        (torch.zeros(3, 1), torch.eye(3), 9, r"shapes \(3, 1\)"),
        (torch.zeros(3), torch.eye(3) * torch.inf, 9, "not finite"),
        (torch.full((3,), torch.nan), torch.eye(3), 9, "not finite"),
        (torch.zeros(3), torch.eye(3).roll(1, 0), 9, "not symmetric"),
        (torch.zeros(3), torch.eye(3), 1, "count=1 must be at least 2"),
    ],
)
def test_wrong_statistics_are_refused(mean, covariance, count, message):
    """Catches a damaged file of statistics that gives a distance."""
    with pytest.raises(ValueError, match=message):
        Moments.from_statistics(mean, covariance, count)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4, 23), r"shape \(4, 23\); expected \(n, 24\)"),
        (torch.zeros(24), r"shape \(24,\)"),
        (torch.full((2, 24), torch.nan), "not finite"),
        (torch.full((2, 24), torch.inf), "not finite"),
    ],
)
def test_wrong_features_are_refused(bad, message):
    """Catches features that are broadcast, or that make all later figures nan; what was added before stays."""
    result = moments(features(30))
    with pytest.raises(ValueError, match=message):
        result.add(bad)
    torch.testing.assert_close(result.covariance, moments(features(30)).covariance)


# The distance


def test_distance_is_the_plain_formula():
    """Catches any slip in the form that takes no root of a product."""
    x, y = features(500), features(400, seed=1, shift=0.3)
    expected = plain_distance(x.double().numpy(), y.double().numpy())
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(moments(y), moments(x)) == pytest.approx(expected, rel=1e-6)


def test_distance_is_torch_fidelitys():
    """Catches a figure that could not be compared with published ones; on few images too, where roots are rough."""
    fid = fidelity_module("metric_fid")
    for count in (500, 12):
        x, y = features(count), features(count, seed=1, shift=0.3)
        statistics = [fid.fid_features_to_statistics(z.double()) for z in (x, y)]
        expected = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, abs=1e-3)


def test_known_distances():
    """Catches a distance that is a root, or that ignores the means or the spread."""
    identity = Moments.from_statistics(torch.zeros(5), torch.eye(5))
    assert frechet_distance(identity, Moments.from_statistics(torch.full((5,), 2.0), torch.eye(5))) == pytest.approx(
        20
    )
    assert frechet_distance(identity, Moments.from_statistics(torch.zeros(5), 9 * torch.eye(5))) == pytest.approx(20)
    diagonal = torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0])
    other = Moments.from_statistics(torch.zeros(5), torch.diag(diagonal))
    assert frechet_distance(identity, other) == pytest.approx((diagonal.sqrt() - 1).square().sum().item())


def test_singular_covariances_are_exact():
    """Catches digits lost to roots of eigenvalues that should be 0: here the exact value comes from small matrices."""
    x, y = (features(20, 200, seed).double() for seed in (0, 1))
    a, b = ((z - z.mean(0)) / 19**0.5 for z in (x, y))
    overlap = torch.linalg.svdvals(a @ b.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * overlap
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected.item(), rel=1e-11)
    assert 0 <= frechet_distance(moments(x), moments(x)) < 1e-10


def test_too_few_images_are_told(caplog):
    """Catches a figure of too few images that looks like any other, or a warning where there are enough."""
    frechet_distance(moments(features(25)), moments(features(25, seed=1)))
    assert not caplog.text
    frechet_distance(moments(features(25)), moments(features(24, seed=1)))
    assert "only 24 images for 24 features" in caplog.text and "at least 25" in caplog.text


def test_what_cannot_be_compared_is_refused():
    """Catches a covariance of one image, or features of two networks."""
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"covariance of {count} features is not defined: at least 2"):
            frechet_distance(moments(features(count)), moments(features(50)))
    with pytest.raises(ValueError, match="length 24 and 23"):
        frechet_distance(Moments(24), Moments(23))
    with pytest.raises(ValueError, match="length 24 and 23"):
        Moments(24).merge(Moments(23))

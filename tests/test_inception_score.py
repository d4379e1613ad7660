"""The Inception Score by its definition and by torch-fidelity."""

import math

import pytest
import torch
from fidelity import fidelity_module

from flowmo_diffusers.metrics.inception_score import inception_score


def logits(count: int, classes: int = 20) -> torch.Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(0))


def test_score_is_torch_fidelitys():
    """Catches splits that are shuffled, a mean over the wrong images, or the deviation of a sample."""
    isc = fidelity_module("metric_isc")
    for splits in (1, 10):
        expected = isc.isc_features_to_metric(logits(200), splits=splits, shuffle=False)
        mean, deviation = inception_score(logits(200).softmax(1), split_size=200 // splits)
        assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-5)
        assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-4, abs=1e-12)


def test_last_split_may_be_shorter():
    """Catches images that are dropped, or a split that is filled up."""
    p = logits(25).softmax(1)
    scores = [inception_score(p[i : i + 10])[0] for i in (0, 10, 20)]
    mean, deviation = inception_score(p, split_size=10)
    assert mean == pytest.approx(sum(scores) / 3)
    assert deviation == pytest.approx(math.sqrt(sum((score - mean) ** 2 for score in scores) / 3))


def test_bounds():
    """Catches 0 log 0 that is no number: sure of all classes equally is their number, never sure is 1."""
    assert inception_score(torch.eye(8)) == (pytest.approx(8), 0)
    assert inception_score(torch.full((16, 8), 1 / 8)) == (pytest.approx(1), 0)
    assert inception_score(torch.eye(8)[:1].repeat(5, 1)) == (pytest.approx(1), 0)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (torch.zeros(0, 5), r"shape \(0, 5\)"),
        (torch.ones(5), r"shape \(5,\)"),
        (torch.full((2, 5), torch.nan), "must sum to 1"),
        (torch.full((2, 5), 0.3), "must sum to 1"),
        (torch.tensor([[1.5, -0.5]]), "must not be negative"),
    ],
)
def test_what_is_no_distribution_is_refused(probabilities, message):
    """Catches logits taken for probabilities."""
    with pytest.raises(ValueError, match=message):
        inception_score(probabilities)
    with pytest.raises(ValueError, match="split_size=0"):
        inception_score(torch.eye(4), split_size=0)

"""The Inception Score of generated images."""

import torch


def inception_score(probabilities: torch.Tensor, split_size: int = 5000) -> tuple[float, float]:
    """
    How surely a classifier tells each image's class, and how evenly the classes are spread: exp of the mean
    KL(p(y|x) || p(y)), p(y) the mean of the split (Salimans et al. 2016, arXiv 1606.03498, section 4).

    Args:
        probabilities: (n, classes), each row a distribution; the order matters if there are several splits.
        split_size: Consecutive images of which one score is computed; the last split may have fewer. 5000 is ADM's
            convention (Dhariwal and Nichol 2021); the original takes 10 splits, whatever their size.

    Returns:
        Mean and standard deviation over the splits, which is 0 for one split. Scores lie in [1, classes].

    Raises:
        ValueError: If there are no images, a row is no distribution, or `split_size` is not positive.
    """
    if probabilities.ndim != 2 or not len(probabilities):
        raise ValueError(f"probabilities have shape {tuple(probabilities.shape)}; expected (n, classes), n at least 1")
    if split_size < 1:
        raise ValueError(f"split_size={split_size} must be at least 1")
    p = probabilities.double()
    # Written so that what is not a number is refused too.
    if not ((p >= 0).all() and ((p.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError("probabilities must not be negative, and each row must sum to 1")
    scores = torch.stack([_score(split) for split in p.split(split_size)])
    return scores.mean().item(), scores.std(correction=0).item()


def _score(p: torch.Tensor) -> torch.Tensor:
    # The mean KL divergence is the entropy of the mean less the mean entropy; entr(0) is 0.
    return (_entropy(p.mean(0)) - _entropy(p).mean()).exp()


def _entropy(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p).sum(-1)

"""Precision and recall are those of a brute-force computation, ties included."""

import pytest
import torch
from fidelity import fidelity_module

from flowmo_diffusers.metrics.manifold import precision_recall


def normal(count: int, dims: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))


def brute_force(samples: torch.Tensor, references: torch.Tensor, k: int) -> tuple[float, float]:
    """As defined: point by point, from differences."""

    def share(points: torch.Tensor, centres: torch.Tensor) -> float:
        radii = []
        for i, centre in enumerate(centres):
            others = torch.cat([centres[:i], centres[i + 1 :]])
            radii.append((others - centre).square().sum(1).sort().values[k - 1])
        inside = [((centres - point).square().sum(1) <= torch.stack(radii)).any() for point in points]
        return sum(map(bool, inside)) / len(inside)

    samples, references = samples.double(), references.double()
    return share(samples, references), share(references, samples)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
@pytest.mark.parametrize("block", [1, 7, 500])
def test_equals_brute_force(neighbours, block):
    """Catches a point that is its own neighbour, the two figures swapped, or blocks that do not see all points."""
    samples, references = normal(37) + 1, 1.5 * normal(52, seed=1)
    expected = brute_force(samples, references, neighbours)
    assert precision_recall(samples, references, neighbours, block) == expected
    assert 0 < expected[1] < expected[0] < 1


def test_duplicates():
    """Catches an equal image that a rounding error puts outside the sphere, or that does not count as a neighbour."""
    points = 100 + normal(12, 64)
    samples, references = points.repeat(5, 1), torch.cat([points[:6].repeat(5, 1), 100 + normal(9, 64, seed=1)])
    for neighbours in (3, 4, 5):  # with 4 other copies of each, the radius is 0 for the first two
        expected = brute_force(samples, references, neighbours)
        assert precision_recall(samples, references, neighbours, block=16) == expected
    assert precision_recall(samples, points[:6].repeat(5, 1), 3) == (0.5, 1.0)
    # Spheres of no size in one set only.
    assert precision_recall(points, samples, 3)[0] == precision_recall(samples, points, 3)[1] == 1.0


def test_neighbours_closer_than_products_can_tell():
    """Catches the cancellation of |x|² + |y|² - 2 x y: differences of a millionth far from the origin."""
    base = 1000 * normal(1, 32).double()
    samples, references = (base + 1e-6 * normal(30, 32, seed).double() * scale for seed, scale in ((1, 1), (2, 1.05)))
    expected = brute_force(samples, references, 3)
    assert precision_recall(samples, references, 3, block=8) == expected
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1


def test_points_on_spheres():
    """Catches a surface that is not part of the sphere: on a grid many distances are exactly equal."""
    generator = torch.Generator().manual_seed(0)
    samples, references = (torch.randint(0, 4, (40, 5), generator=generator).float() + 0.1 for _ in range(2))
    assert precision_recall(samples, references, 2, block=9) == brute_force(samples, references, 2)
    line = torch.arange(4.0)[:, None]
    assert precision_recall(line, line + 4, neighbours=1) == (0.25, 0.25)


def test_equals_torch_fidelity():
    """Catches another convention than that of published figures."""
    prc = fidelity_module("metric_prc")
    samples, references = normal(60, 8), 1.3 * normal(80, 8, seed=1)
    expected = prc.prc_features_to_metric(
        samples, references, prc_neighborhood=3, prc_batch_size=25, save_cpu_ram=True, verbose=False
    )
    assert precision_recall(samples, references) == pytest.approx((expected["precision"], expected["recall"]))
    assert 0 < expected["precision"] < 1


def test_half_precision_features():
    """Catches distances computed in the features' own type."""
    samples, references = normal(40).half(), normal(40, seed=1).half()
    assert precision_recall(samples, references) == brute_force(samples, references, 3)


@pytest.mark.parametrize(
    ("samples", "references", "neighbours", "message"),
    [
        (normal(3), normal(9), 3, r"samples have shape \(3, 6\).*greater than neighbours=3"),
        (normal(9), normal(0), 3, r"references have shape \(0, 6\)"),
        (normal(9)[0], normal(9), 3, r"samples have shape \(6,\)"),
        (normal(9), normal(9) * torch.inf, 3, "references have values that are not finite"),
        (normal(9), normal(9, 5), 3, "samples have 6 features and references 5"),
        (normal(9), normal(9), 0, "neighbours=0"),
    ],
)
def test_wrong_sets_are_refused(samples, references, neighbours, message):
    """Catches figures of sets that cannot be compared."""
    with pytest.raises(ValueError, match=message):
        precision_recall(samples, references, neighbours)
    with pytest.raises(ValueError, match="block=0"):
        precision_recall(normal(9), normal(9), block=0)

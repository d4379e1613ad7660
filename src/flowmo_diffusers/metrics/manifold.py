"""Precision and recall: how much of one set of images lies among the images of another."""

import torch


_EXACT_PAIRS = 4096  # pairs whose differences are held at a time


def precision_recall(
    samples: torch.Tensor, references: torch.Tensor, neighbours: int = 3, block: int = 500
) -> tuple[float, float]:
    """
    Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2). A set's manifold is
    the union of spheres about its points, each as large as the distance to the k-th nearest other point, surface
    included. Precision is the share of samples on the references' manifold, recall that of references on the samples'.

    Distances are those of explicit differences in float64. Products of matrices, many times as fast, decide wherever
    their error cannot matter; the rest is computed again: equal images thus lie on each other's spheres, which a
    rounding error would deny.

    Args:
        samples: Features (n, d) of generated images.
        references: Features (m, d) of real ones.
        neighbours: k.
        block: Points compared with a whole set at a time: memory is block x (n or m) numbers of 8 bytes, a few times.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: If features differ in length or are not finite, a set has not more than k points, or `neighbours`
            or `block` is not positive.
    """
    if neighbours < 1 or block < 1:
        raise ValueError(f"neighbours={neighbours} and block={block} must be at least 1")
    for name, points in (("samples", samples), ("references", references)):
        if points.ndim != 2 or len(points) <= neighbours:
            raise ValueError(
                f"{name} have shape {tuple(points.shape)}; expected (n, d), n greater than neighbours={neighbours}"
            )
        if not points.isfinite().all():
            raise ValueError(f"{name} have values that are not finite")
    if samples.shape[1] != references.shape[1]:
        raise ValueError(
            f"samples have {samples.shape[1]} features and references {references.shape[1]}: they must agree"
        )
    samples, references = samples.double(), references.double()
    sample_radii = _squared_radii(samples, neighbours, block)
    reference_radii = _squared_radii(references, neighbours, block)

    precise = 0
    recalled = torch.zeros(len(references), dtype=torch.bool, device=references.device)
    for points, radii in zip(samples.split(block), sample_radii[:, None].split(block), strict=True):
        squares, error = _squared_distances(points, references)
        doubtful = ((squares - reference_radii).abs() <= error) | ((squares - radii).abs() <= error)
        _make_exact(squares, doubtful, points, references)
        precise += (squares <= reference_radii).any(1).sum().item()
        recalled |= (squares <= radii).any(0)
    return precise / len(samples), recalled.double().mean().item()


def _squared_radii(points: torch.Tensor, neighbours: int, block: int) -> torch.Tensor:
    """Squared distance (n,) of each point (n, d) to its k-th nearest other point."""
    radii = []
    for start in range(0, len(points), block):
        rows = points[start : start + block]
        squares, error = _squared_distances(rows, points)
        squares.diagonal(start).fill_(torch.inf)
        # All that can be among the k nearest.
        near = squares <= squares.kthvalue(neighbours, keepdim=True).values + 2 * error
        _make_exact(squares, near, rows, points)
        radii.append(squares.kthvalue(neighbours).values)
    return torch.cat(radii)


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, float]:
    """|x|² + |y|² - 2 x y (n, m) of points (n, d) and (m, d), and a bound of its error for any of them."""
    x_squares, y_squares = x.square().sum(1), y.square().sum(1)
    squares = torch.addmm(x_squares[:, None] + y_squares, x, y.T, alpha=-2)
    largest = (x_squares.max() + y_squares.max()).item()
    return squares, 4 * (x.shape[1] + 4) * torch.finfo(torch.float64).eps * largest


def _make_exact(squares: torch.Tensor, where: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Replaces squared distances (n, m) of points by those of their differences, where `where` (n, m) says so."""
    for rows, columns in zip(*(index.split(_EXACT_PAIRS) for index in where.nonzero(as_tuple=True)), strict=True):
        squares[rows, columns] = (x[rows] - y[columns]).square().sum(1)

"""Weight norms that stay where they began."""

import pytest
import torch
from torch import nn

from flowmo_diffusers.engine.norms import NormRescaler


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (2, 2), (1, 7))]


def test_norms_are_restored_and_directions_kept():
    """Catches a norm per row, a norm over all matrices, or a rescaling that is not a multiple of the matrix."""
    weights = matrices()
    initial = [weight.norm().item() for weight in weights]
    rescaler = NormRescaler(weights)
    with torch.no_grad():
        for i, weight in enumerate(weights):
            weight.add_(torch.randn_like(weight)).mul_(i + 2)
    moved = [weight.detach().clone() for weight in weights]
    rescaler.step()
    assert [weight.norm().item() for weight in weights] == pytest.approx(initial, rel=1e-6)
    for weight, before in zip(weights, moved, strict=True):
        torch.testing.assert_close(weight / weight.norm(), before / before.norm())


def test_norms_of_frozen_weights_are_left_alone():
    """Catches a frozen encoder whose weights change by rounding, and with them codes that are already stored."""
    weights = matrices()
    rescaler = NormRescaler(weights)
    weights[1].requires_grad_(False)
    with torch.no_grad():
        weights[0].mul_(2)
        weights[1].mul_(2)
    rescaler.step()
    assert weights[0].norm().item() == pytest.approx(rescaler.norms[0].item())
    assert weights[1].norm().item() == pytest.approx(2 * rescaler.norms[1].item())
    for weight in weights:
        weight.requires_grad_(False)
    rescaler.step()


def test_norms_under_training():
    """Catches a rescaling that autograd records, or parameters replaced by others the optimizer does not know."""
    weights = matrices()
    rescaler, optimizer = NormRescaler(weights), torch.optim.Adam(weights, lr=0.1)
    for _ in range(3):
        sum((weight - 1).square().sum() for weight in weights).backward()
        optimizer.step()
        moments = [optimizer.state[weight]["exp_avg"].clone() for weight in weights]
        rescaler.step()
        assert all(weight.is_leaf and weight.requires_grad and weight.grad is not None for weight in weights)
        assert all(torch.equal(optimizer.state[w]["exp_avg"], m) for w, m in zip(weights, moments, strict=True))
        optimizer.zero_grad()
    assert [optimizer.state[weight]["step"].item() for weight in weights] == [3, 3, 3]
    assert [w.norm().item() for w in weights] == pytest.approx([n.item() for n in rescaler.norms], rel=1e-6)


def test_norms_resume():
    """Catches a resumed run that holds the norms it started again with instead of the initial ones."""
    weights = matrices()
    state = NormRescaler(weights).state_dict()
    with torch.no_grad():
        for weight in weights:
            weight.mul_(3)
    resumed = NormRescaler(weights)
    resumed.load_state_dict(state)
    resumed.step()
    torch.testing.assert_close(torch.stack([weight.norm() for weight in weights]), state["norms"])
    with pytest.raises(ValueError, match="norms of 3 weights; this model has 2"):
        NormRescaler(weights[:2]).load_state_dict(state)

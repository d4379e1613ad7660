"""The figures of a tokenizer."""

import pytest
import torch

from flowmo_diffusers.metrics.evaluation import ReconstructionEvaluation
from flowmo_diffusers.metrics.protocol import Protocol
from flowmo_diffusers.metrics.reconstructors import Reconstruction
from flowmo_diffusers.objectives.perceptual import load_perceptual_network


def reconstruction(images):
    return Reconstruction(images, torch.full((len(images),), 3.0, dtype=torch.float64))


def test_rows_depend_on_weights_and_protocol():
    """Other weights of LPIPS, or another protocol, are another key: nothing stale is taken for new."""
    lpips = load_perceptual_network("lpips-alex")
    found = [ReconstructionEvaluation(Protocol(), {"lpips_alex": lpips}, None).description]
    found.append(ReconstructionEvaluation(Protocol(rounding="float"), {"lpips_alex": lpips}, None).description)
    found.append(ReconstructionEvaluation(Protocol(), {}, None).description)
    with torch.no_grad():
        lpips.heads[0][0] += 1
    found.append(ReconstructionEvaluation(Protocol(), {"lpips_alex": lpips}, None).description)
    assert all(a != b for number, a in enumerate(found) for b in found[:number])


def test_what_is_measured_is_what_was_stored():
    """As JPEG if the protocol has it, rounded for the networks as it says."""
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = (x + 0.1).clamp(-1, 1)
    plain, jpeg = (
        ReconstructionEvaluation(Protocol(jpeg_quality=quality), {}, None).rows(x, reconstruction(y))
        for quality in (None, 20)
    )
    assert plain["num_bytes"].tolist() == [3.0, 3.0] and "pool" not in plain
    assert (jpeg["squared_error"] > 2 * plain["squared_error"]).all() and (jpeg["ssim"] < plain["ssim"]).all()


def test_images_that_are_not_finite_are_refused():
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="images y have values that are not finite"):
        ReconstructionEvaluation(Protocol(), {}, None).rows(x, reconstruction(x / 0))


def test_precision_needs_features():
    with pytest.raises(ValueError, match="needs a feature network"):
        ReconstructionEvaluation(Protocol(), {}, None, manifold=True)

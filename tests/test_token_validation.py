"""Validation of a token generator hides the same groups of the same images, however many processes share them."""

import math
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from processes import on_processes, own_accelerators
from token_models import build_generator, random_indices

from flowmo_diffusers import FlowMoTokenGenerator
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.metrics.token_validation import MASK_RATIOS, TokenValidation
from flowmo_diffusers.objectives.tokens import log_likelihood, masked_losses


IMAGES = 7
LABELS = torch.arange(IMAGES) % 3


@pytest.fixture(autouse=True)
def separate() -> Iterator[None]:
    with own_accelerators():
        yield


def measure(order: str, images: int = IMAGES, **options) -> dict[str, float]:
    model = build_generator(order=order)
    indices = random_indices(model, images)
    return TokenValidation(Accelerator(cpu=True), indices, LABELS[:images], **options)(model)


def test_masked_figures_are_those_of_the_losses():
    """Catches a ratio under another's name, draws shared by images or ratios, or bits of another base."""
    figures = measure("masked", seed=5, batch_size=3)
    model = build_generator()
    expected = {}
    for ratio in (0.1, 0.3, 0.5, 0.7, 0.9):
        generators = [keyed_generator(5, f"validation at {ratio}", number) for number in range(IMAGES)]
        losses = masked_losses(model, random_indices(model, IMAGES), LABELS, ratio, generators)
        expected[f"token_loss_at_{ratio}"] = losses.mean().item()
    mean = sum(expected.values()) / 5
    expected |= {"token_loss": mean, "bits_per_bit": mean / math.log(2) / 3}
    assert figures == pytest.approx(expected, rel=1e-5)
    assert MASK_RATIOS == (0.1, 0.3, 0.5, 0.7, 0.9)


def test_autoregressive_figures_are_the_likelihood():
    """Catches a bound in place of the likelihood, a mean over other than the groups, or ratios that mean nothing."""
    model = build_generator(order="autoregressive")
    expected = -log_likelihood(model, random_indices(model, IMAGES), LABELS).mean().item() / 16
    figures = measure("autoregressive", batch_size=2)
    assert figures == pytest.approx({"token_loss": expected, "bits_per_bit": expected / math.log(2) / 3}, rel=1e-5)


def test_a_coin_is_one_bit_a_bit():
    """Catches a figure whose unit is not what it says."""
    model = FlowMoTokenGenerator(**build_generator().config).eval()
    torch.nn.init.zeros_(model.head.linear.weight)
    figures = TokenValidation(Accelerator(cpu=True), random_indices(model, IMAGES), LABELS)(model)
    assert figures["bits_per_bit"] == pytest.approx(1) and figures["token_loss"] == pytest.approx(3 * math.log(2))


@pytest.mark.parametrize("order", ["masked", "autoregressive"])
def test_same_figures_each_time(order):
    """Catches draws that go on from one validation to the next, or depend on the batch size."""
    model = build_generator(order=order)
    validation = TokenValidation(Accelerator(cpu=True), random_indices(model, IMAGES), LABELS)
    first = validation(model)
    assert first == validation(model)
    assert measure(order, batch_size=1) == pytest.approx(first, rel=1e-5)
    assert (measure(order, seed=1) == first) == (order == "autoregressive")


def test_other_ratios():
    """Catches ratios that are fixed, or whose names have the digits of a float."""
    figures = measure("masked", ratios=(0.25, 1.0, 0.30000000000000004))
    names = {"token_loss", "bits_per_bit", "token_loss_at_0.25", "token_loss_at_1", "token_loss_at_0.3"}
    assert figures.keys() == names
    assert figures["token_loss"] == pytest.approx(sum(figures[name] for name in names if "_at_" in name) / 3)


@pytest.mark.parametrize(
    ("order", "images", "processes", "batch_size"),
    [("masked", 7, 2, 2), ("masked", 1, 2, 4), ("autoregressive", 7, 3, 1)],
)
def test_processes_share_the_images(order, images, processes, batch_size):
    """Catches images left out or counted twice where they cannot be divided, or processes that wait for ever."""
    expected = measure(order, images)
    for figures in on_processes(processes, measure_small, order, images, batch_size):
        assert figures == pytest.approx(expected, rel=1e-5)


def measure_small(order: str, images: int, batch_size: int) -> dict[str, float]:
    return measure(order, images, batch_size=batch_size)

"""What is said of a codebook must be what was counted, and no more than the number of tokens allows."""

import math

import pytest
import torch

from flowmo_diffusers.metrics.codebook import codebook_health, codebook_use
from flowmo_diffusers.models.quantizers import build_quantizer


def test_a_perfect_codebook_is_perfect():
    """Catches an entropy in nats, a balance about another centre, or codes counted over groups together."""
    codes = torch.arange(16)
    indices = torch.stack([codes, codes.flip(0), (codes + 5) % 16], dim=-1).reshape(2, 8, 3)
    assert codebook_health(indices, 4) == {
        "bit_imbalance": 0.0,
        "worst_bit_imbalance": 0.0,
        "dead_bits": 0.0,
        "used_codes": 16.0,
        "usable_codes": 16.0,
        "entropy_bits": 4.0,
        "max_entropy_bits": 4,
    }


def test_known_shares_by_hand():
    """Catches bits read from the wrong end, counts that are not weighted, or a worst bit hidden in the mean."""
    # One group of 3 bits; in 8 tokens bit 0 is set 6 times, bit 1 never, bit 2 once.
    indices = torch.tensor([1, 1, 1, 1, 1, 5, 0, 0]).reshape(2, 4, 1)
    health = codebook_health(indices, 3)
    assert health["bit_imbalance"] == pytest.approx((0.5 + 1.0 + 0.75) / 3)
    assert health["worst_bit_imbalance"] == 1.0
    assert health["dead_bits"] == 1
    assert health["used_codes"] == 3
    expected = -sum(p * math.log2(p) for p in (5 / 8, 1 / 8, 2 / 8))
    assert health["entropy_bits"] == pytest.approx(expected)


def test_bits_are_dead_only_if_dead_in_every_image():
    """Catches a bit called dead that is constant within each image, or one that a single token keeps alive."""
    indices = torch.tensor([[[0], [0]], [[1], [1]]])
    assert codebook_health(indices, 2)["dead_bits"] == 1
    rare = torch.zeros(100, 100, 1, dtype=torch.long)
    rare[-1, -1] = 1
    assert codebook_health(rare, 2)["dead_bits"] == 1
    assert codebook_health(rare, 2)["worst_bit_imbalance"] == 1.0


def test_few_tokens_cannot_fill_a_codebook():
    """Catches figures measured against a codebook that so few tokens could never show."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 2**14, (2, 64, 4), generator=generator)
    health = codebook_health(indices, 14)
    assert health["usable_codes"] == 128
    assert health["max_entropy_bits"] == 7.0
    assert health["entropy_bits"] <= 7.0
    # With as many tokens as codes a uniform codebook shows 1 - 1/e of itself.
    indices = torch.randint(0, 2**8, (16, 16, 64), generator=generator)
    assert codebook_health(indices, 8)["used_codes"] == pytest.approx((1 - math.exp(-1)) * 256, rel=0.02)


def test_channels_of_several_levels():
    """Catches FSQ counted as if a channel were one bit: what is dead must agree with the quantizer's own codes."""
    quantizer = build_quantizer("fsq", channels=4, codebook_bits=6, fsq_levels=8)
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 8, (8, 32, 4), generator=generator)
    levels[..., 2] = 5  # a dead channel: all three of its bits
    levels[..., 1] = torch.randint(4, 8, (8, 32), generator=generator)  # half of the levels: one bit
    indices = quantizer.codes_to_indices(quantizer.levels_to_codes(levels))
    health = codebook_health(indices, quantizer.group_size, quantizer.levels)
    assert health["dead_bits"] == 4
    assert health["usable_codes"] == 64
    # Groups hold channels (0, 2) and (1, 3): 8 x 1 and 4 x 8 codes.
    assert health["used_codes"] == (8 + 32) / 2


def test_many_images_are_no_burden():
    """Catches memory or time that grows with codes x tokens: 2.6 million tokens of 14 bits, as in 10 000 images."""
    indices = torch.arange(2_560_000).reshape(10_000, 256, 1) % 2**14
    health = codebook_health(indices, 14)
    assert health["used_codes"] == 2**14
    assert health["entropy_bits"] == pytest.approx(14, abs=1e-3)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), "expected"),
        (torch.zeros(0, 8, 2, dtype=torch.long), "expected"),
        (torch.full((1, 2, 1), 8), r"\[0, 8\)"),
        (torch.full((1, 2, 1), -1), r"\[0, 8\)"),
    ],
)
def test_wrong_indices_are_refused(indices, message):
    """Catches figures of indices that belong to another quantizer."""
    with pytest.raises(ValueError, match=message):
        codebook_health(indices, 3)


def test_any_codebook_has_a_use():
    """Catches a size that is taken for a power of two, or bits said of codes whose numbering means nothing."""
    indices = torch.tensor([0, 0, 9, 9]).reshape(1, 4, 1).repeat(5, 1, 1)
    use = codebook_use(indices, 10)
    assert use == {"used_codes": 2.0, "usable_codes": 10.0, "entropy_bits": 1.0, "max_entropy_bits": math.log2(10)}
    with pytest.raises(ValueError, match=r"10 codes lie in \[0, 10\)"):
        codebook_use(indices + 1, 10)

"""Tokens as bits, seen and edited."""

import numpy as np
import pytest
import torch

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.page.bits import CELL, bit_picture, flip_bits, mix_tokens, pack, unpack


@pytest.fixture
def bits() -> np.ndarray:
    return np.random.default_rng(0).random((64, 24)) < 0.5


@pytest.mark.parametrize("quantizer", ["lfq", "fsq"])
def test_bits_are_those_of_the_codes(tiny_config: dict, quantizer: str):
    """Bits of another token, channel or level than the packed codes have, or padding taken for a bit."""
    config = tiny_config | {"num_latent_tokens": 7, "quantizer": quantizer}
    if quantizer == "fsq":
        config |= {"fsq_levels": 8, "latent_channels": 3, "codebook_bits": 9}
    autoencoder = FlowMoAutoencoder(**config)
    groups = autoencoder.quantize.groups
    indices = torch.randint(
        0, 2 ** config["codebook_bits"], (1, 7, groups), generator=torch.Generator().manual_seed(0)
    )
    codes = autoencoder.indices_to_codes(indices)
    packed = autoencoder.pack_codes(codes)[0]
    bits = unpack(packed, 7)
    assert bits.shape == (7, autoencoder.bits_per_token)
    assert pack(bits) == packed
    if quantizer == "lfq":
        assert np.array_equal(bits, codes[0].numpy() > 0)


def test_picture(bits: np.ndarray):
    """Tokens in the wrong order, black for white, or marks on other bits."""
    marked = np.zeros_like(bits)
    marked[40, 3] = True
    cells = np.asarray(bit_picture(bits, marked))[CELL // 2 :: CELL, CELL // 2 :: CELL].astype(int)
    assert cells.shape == (32, 49, 3)  # two columns of 32 tokens with a gap between them
    white = cells.mean(axis=2) > 128
    assert np.array_equal(white[:, :24], bits[:32])
    coloured = np.ptp(cells, axis=2) > 50
    assert np.argwhere(coloured).tolist() == [[8, 25 + 3]]
    plain = np.asarray(bit_picture(bits))[CELL // 2 :: CELL, CELL // 2 :: CELL].mean(axis=2) > 128
    assert np.array_equal(plain[:, 25:], bits[32:])


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 56), (256, 18)])
def test_picture_of_any_tokenizer(shape: tuple[int, int]):
    """A number of tokens that does not fill the columns."""
    picture = np.asarray(bit_picture(np.ones(shape, bool)))[::CELL, ::CELL]
    assert (picture.mean(axis=2) > 240).sum() == shape[0] * shape[1]


def test_flip(bits: np.ndarray):
    """Bits flipped twice, outside the range, in place, or others the next time."""
    before = bits.copy()
    flipped = flip_bits(bits, 30, np.random.default_rng(1), first=10, last=12)
    changed = flipped != bits
    assert changed.sum() == 30 and changed[10:13].sum() == 30
    assert np.array_equal(bits, before)
    assert np.array_equal(flipped, flip_bits(bits, 30, np.random.default_rng(1), first=10, last=12))
    assert np.array_equal(flip_bits(bits, bits.size, np.random.default_rng(0)), ~bits)


def test_mix(bits: np.ndarray):
    """Tokens of the wrong image, or torn apart."""
    mixed, taken = mix_tokens(bits, ~bits, 20)
    assert np.array_equal(mixed[:44], bits[:44]) and np.array_equal(mixed[44:], ~bits[44:])
    assert np.flatnonzero(taken[:, 0]).tolist() == list(range(44, 64))
    mixed, taken = mix_tokens(bits, ~bits, 20, np.random.default_rng(2))
    assert taken.sum() == 20 and not taken[44:].all()
    assert np.array_equal(mixed != bits, np.broadcast_to(taken, bits.shape))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda bits, rng: flip_bits(bits, 1, rng, 5, 64), "tokens 5 to 64: expected 0 <= first <= last <= 63"),
        (lambda bits, rng: flip_bits(bits, 1, rng, 5, 4), "tokens 5 to 4"),
        (lambda bits, rng: flip_bits(bits, 25, rng, 5, 5), "25 bits to flip: tokens 5 to 5 have 24"),
        (lambda bits, rng: mix_tokens(bits, bits, 65), "65 tokens of the other image: there are 64"),
        (lambda bits, rng: mix_tokens(bits, bits[:, :3], 1), "of one tokenizer"),
    ],
)
def test_refused(bits: np.ndarray, edit, reason: str):
    """A range that is silently another one."""
    with pytest.raises(ValueError, match=reason):
        edit(bits, np.random.default_rng(0))

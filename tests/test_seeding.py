"""Random numbers that depend on where a run is, not on how it got there."""

import itertools
import random

import numpy as np
import pytest
import torch

from flowmo_diffusers.engine.seeding import draw_uniform, keyed_generator
from flowmo_diffusers.objectives.flow import FlowDraws
from flowmo_diffusers.objectives.posttrain import ChainDraws


def test_every_key_has_its_own_numbers():
    """Catches seeds, purposes or indices that share their noise, and one that depends on what was drawn before."""
    indices = (0, 1, 2, 1000, 2**32, 2**40)
    keys = list(itertools.product((0, 1, 2**31, 2**40), ("pretrain", "posttrain", "validation", ""), indices))
    draws = [torch.rand(4, generator=keyed_generator(*key)) for key in keys]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(keys)
    for key, draw in reversed(list(zip(keys, draws, strict=True))):
        assert torch.equal(torch.rand(4, generator=keyed_generator(*key)), draw)


def test_many_indices_are_independent():
    """Catches neighbouring visits whose noise is correlated, as that of consecutive seeds can be."""
    draws = torch.stack([torch.randn(64, generator=keyed_generator(0, "noise", index)) for index in range(4000)])
    assert draws.mean().abs() < 0.01 and (draws.std() - 1).abs() < 0.01
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.09  # 5.5 standard deviations
    assert (draws[:-1] * draws[1:]).mean().abs() < 0.01


def test_numbers_stay_the_same():
    """Catches a key that is hashed anew in each process, or another hash: runs could not be resumed across it."""
    generators = [keyed_generator(0, "pretrain", 0), keyed_generator(7, "validation", 123)]
    assert [g.initial_seed() for g in generators] == [3355241008924764081, 638557727389258333]


def test_the_global_state_is_left_alone():
    """Catches a generator that is one of the process's own, or that moves them on."""
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    keyed_generator(3, "noise", 1).seed()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_negative_numbers_are_refused():
    """Catches a key without numbers of its own that silently takes another's."""
    for key in ((-1, "noise", 0), (0, "noise", -1)):
        with pytest.raises(ValueError, match="non-negative"):
            keyed_generator(*key)


def test_uniform_numbers_of_a_row_are_its_own():
    """Catches numbers that depend on the batch, or a list of another length that is broadcast over it."""
    indices = [4, 0, 2]
    rows = draw_uniform((3, 5, 2), [keyed_generator(0, "tokens", index) for index in indices], "cpu")
    assert rows.shape == (3, 5, 2) and rows.dtype == torch.float32
    for row, index in zip(rows, indices, strict=True):
        assert torch.equal(draw_uniform((1, 5, 2), [keyed_generator(0, "tokens", index)], "cpu")[0], row)
        assert torch.equal(torch.rand(5, 2, generator=keyed_generator(0, "tokens", index)), row)
    assert draw_uniform((3,), [keyed_generator(0, "tokens", index) for index in indices], "cpu").shape == (3,)
    for count in (1, 2):
        with pytest.raises(ValueError, match=f"generator is a list of {count}; expected one for each of 3"):
            draw_uniform((3, 5), [torch.Generator()] * count, "cpu")


def test_uniform_numbers_of_one_generator_or_none():
    """Catches a generator that is not used, one that is used where there is none, or a row that is all rows'."""
    first, again = (draw_uniform((50, 40), keyed_generator(0, "tokens", 0), "cpu") for _ in range(2))
    assert torch.equal(first, again) and len(first.unique(dim=0)) == 50
    assert first.min() >= 0 and first.max() < 1 and first.mean().item() == pytest.approx(0.5, abs=0.03)
    assert not torch.equal(draw_uniform((4, 2), None, "cpu"), draw_uniform((4, 2), None, "cpu"))
    torch.manual_seed(0)
    expected = torch.rand(4, 2)
    torch.manual_seed(0)
    assert torch.equal(draw_uniform((4, 2), None, "cpu"), expected)


def flow(x: torch.Tensor, visits: list[int]) -> list[torch.Tensor]:
    return list(vars(FlowDraws.sample(x, [keyed_generator(0, "pretrain", visit) for visit in visits], 0.5)).values())


def chain(x: torch.Tensor, visits: list[int]) -> list[torch.Tensor]:
    return list(vars(ChainDraws.sample(x, [keyed_generator(0, "posttrain", visit) for visit in visits])).values())


@pytest.mark.parametrize("sample", [flow, chain])
@pytest.mark.parametrize("side", [1, 2, 16])
def test_draws_of_an_image_are_its_own_in_any_batch(sample, side):
    """Catches draws that depend on the batch: a run on other processes, or resumed, would go another way."""
    x = torch.zeros(6, 3, side, side)
    visits = [5, 0, 3, 1, 4, 2]
    whole = sample(x, visits)
    parts = [sample(x[:n], visits[first : first + n]) for first, n in ((0, 1), (1, 3), (4, 2))]
    for together, *apart in zip(whole, *parts, strict=True):
        assert len(together) == 6 and torch.equal(together, torch.cat(apart))
    for together, ordered in zip(whole, sample(x, sorted(visits)), strict=True):
        assert torch.equal(together, ordered[visits])
    assert len(whole[0].flatten(1).unique(dim=0)) == 6

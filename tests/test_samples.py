"""SampleCache: what is kept is what is read, and nothing else."""

import numpy as np
import pytest
import torch

from flowmo_diffusers.data.samples import SampleCache


SHAPE = (5, 3, 4, 4)


def samples(count: int) -> torch.Tensor:
    return torch.rand(count, *SHAPE[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_samples_come_back(tmp_path) -> None:
    """Catches samples of other numbers, a batch that is there in part only, and what a second reader does not see."""
    cache, other = (SampleCache(tmp_path / "cache", SHAPE, {"seed": 0}) for _ in range(2))
    assert len(cache) == 0 and cache.read([3, 1]) is None
    kept = cache.write([3, 1], samples(2))
    assert torch.equal(kept, samples(2).half().float())
    for reader in (cache, other, SampleCache(tmp_path / "cache", SHAPE, {"seed": 0})):
        assert torch.equal(reader.read([1, 3]), kept.flip(0)) and len(reader) == 2
        assert reader.read([3, 2]) is None


@pytest.mark.parametrize(
    ("shape", "identity", "message"),
    [(SHAPE, {"seed": 1}, "seed is 0 there and 1 here"), ((6, 3, 4, 4), {"seed": 0}, "shape is")],
)
def test_another_teachers_samples_are_refused(tmp_path, shape, identity, message) -> None:
    """Catches a folder that is taken over from a run with another teacher or other images."""
    SampleCache(tmp_path / "cache", SHAPE, {"seed": 0})
    with pytest.raises(ValueError, match=message):
        SampleCache(tmp_path / "cache", shape, identity)


def test_a_cache_half_made_is_made_anew(tmp_path) -> None:
    """Catches a process killed while it made the files, after which no run could start."""
    (tmp_path / "cache").mkdir()
    np.save(tmp_path / "cache" / "samples.npy", np.zeros(3))
    cache = SampleCache(tmp_path / "cache", SHAPE, {})
    assert torch.equal(cache.write([0], samples(1)), samples(1).half().float())

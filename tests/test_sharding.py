"""Averages and norms of a model whose weights FSDP2 has split over processes are those of the whole model."""

import warnings

import pytest
import torch
from processes import on_processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.engine.norms import NormRescaler
from flowmo_diffusers.engine.sharding import norms, reshard, whole_state_dict


STEPS = 4


class Model(nn.Module):
    """Odd numbers of rows, fewer rows than processes, a frozen matrix, and one that no gradient reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((6, 7), (7, 5), (5, 1), (1, 3), (3, 3)))
        self.layers[3].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:4]:
            x = layer(x)
        return x


def train(model: Model) -> dict:
    """Everything a run does with averages and norms, and what comes out of it, whole and by name."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = EMA(model.parameters(), decay=0.9, update_every=1)
    rescaler = NormRescaler([layer.weight for layer in model.layers])
    generator, found = torch.Generator().manual_seed(1), {}

    def loss() -> torch.Tensor:
        return (model(torch.randn(8, 6, generator=generator)) - 1).square().mean()

    def keep(name: str, tensors) -> None:
        found[name] = [t.full_tensor() if isinstance(t, DTensor) else t.detach().clone() for t in tensors]

    for step in range(STEPS):
        loss().backward()
        keep(f"gradient norms {step}", norms([p.grad for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
        rescaler.step()
        ema.update(model.parameters(), step)
    keep("weights", model.parameters())
    found["averages"] = [average.clone() for average in ema.state_dict()["shadow_params"]]
    keep("norms", rescaler.state_dict().values())

    other = EMA(model.parameters(), decay=0.9, update_every=1)
    other.load_state_dict(ema.state_dict())
    resumed = NormRescaler([layer.weight for layer in model.layers])
    resumed.load_state_dict(rescaler.state_dict())
    rescaler.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    resumed.step()
    other.update(model.parameters(), STEPS)
    keep("weights after resuming", model.parameters())
    keep("averages after resuming", other.shadow_params)

    with other.applied(model.parameters()):
        keep("applied", model.parameters())
        state = {name: tensor.clone() for name, tensor in whole_state_dict(model).items()}
        with torch.no_grad():
            loss()
        reshard(model)
    loss().backward()
    keep("gradients after validation", [p.grad for p in model.parameters() if p.grad is not None])
    return found | {"names": list(state), "state": list(state.values())}


def train_sharded() -> dict:
    warnings.simplefilter("error")
    model = Model()
    for layer in model.layers[:2]:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return train(model)


@pytest.fixture(scope="module")
def sharded() -> list[dict]:
    return on_processes(2, train_sharded)


@pytest.fixture(scope="module")
def plain() -> dict:
    return train(Model())


def assert_equal(sharded: list[dict], plain: dict, *names: str) -> None:
    for found in sharded:
        for name in names:
            assert len(found[name]) == len(plain[name]) > 0, name
            assert not any(isinstance(tensor, DTensor) for tensor in found[name]), name
            torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-6)


def test_norms_are_those_of_whole_tensors(sharded, plain):
    """Catches the norm of one process's part, or of a part that is empty, taken for that of the whole."""
    assert_equal(sharded, plain, "norms", *(f"gradient norms {step}" for step in range(STEPS)))


def test_training(sharded, plain):
    """Catches parts that are rescaled by their own norms, and averages that miss a part or a frozen weight."""
    assert_equal(sharded, plain, "weights", "averages")
    assert not torch.equal(plain["weights"][0], plain["averages"][0])


def test_resuming(sharded, plain):
    """Catches whole averages of a checkpoint that are not split again as the weights are, or norms that are lost."""
    assert_equal(sharded, plain, "weights after resuming", "averages after resuming")


def test_export(sharded, plain):
    """Catches an exported model of parts, of raw weights in place of averages, or under the names of a wrapper."""
    assert_equal(sharded, plain, "applied")
    assert sharded[0]["names"] == plain["names"] == list(Model().state_dict())
    assert_equal(sharded[:1], plain, "state")
    torch.testing.assert_close(plain["state"], plain["applied"])
    assert sharded[1]["state"] == []


def test_training_goes_on_from_the_weights(sharded, plain):
    """Catches weights that a validation of the averages left gathered: the next step would take those for its own."""
    assert_equal(sharded, plain, "gradients after validation")

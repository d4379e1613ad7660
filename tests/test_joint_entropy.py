"""LFQ's batch entropy over all processes and accumulated batches is that of one process with the joint batch."""

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from processes import on_processes, own_accelerators

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.engine.checkpoints import Progress
from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.engine.step import TrainStep
from flowmo_diffusers.models.quantizers import lfq_entropies
from flowmo_diffusers.objectives.flow import FlowDraws
from flowmo_diffusers.objectives.joint import JointCodeDistribution
from flowmo_diffusers.objectives.pretrain import LossWeights, pretraining_loss


JOINT, STEPS = 8, 2
WEIGHTS = LossWeights(entropy=0.5)  # so large that nothing else hides it
BITS_14 = {"latent_channels": 28, "codebook_bits": 14}


@pytest.fixture(autouse=True)
def separate() -> Iterator[None]:
    with own_accelerators():
        yield


# The function


@pytest.mark.parametrize("bits", [1, 3, 9, 14])
def test_entropy_of_parts_is_that_of_the_whole(bits):
    """Catches a joint distribution that changes the gradient's direction or size, or the entropy of each vector."""
    vectors = (torch.randn(4, 16, bits, generator=torch.Generator().manual_seed(0)) * 0.1).requires_grad_()
    per_sample, codebook = lfq_entropies(vectors.flatten(0, 1))
    (expected,) = torch.autograd.grad(codebook, vectors)

    means = []
    for part in vectors:
        lfq_entropies(part, joint_mean=lambda mean: (means.append(mean), mean)[1])
    assert not any(mean.requires_grad for mean in means)
    joint = torch.stack(means).mean(0)
    parts = [lfq_entropies(part, joint_mean=lambda mean: joint) for part in vectors]
    for _, value in parts:
        assert value.item() == pytest.approx(codebook.item(), rel=1e-6)
    assert sum(value.item() for value, _ in parts) / 4 == pytest.approx(per_sample.item(), rel=1e-6)
    (found,) = torch.autograd.grad(sum(value for _, value in parts) / 4, vectors)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    if bits > 1:
        alone = sum(lfq_entropies(part)[1].item() for part in vectors) / 4
        assert alone < codebook.item() - 0.01  # what is put right


# A training step


def train(config: dict, accumulation: int, is_joint: bool) -> dict:
    """Steps of this process on its share of the same images, gradients of the first, and weights after all."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    torch.manual_seed(0)
    model = FlowMoAutoencoder(**config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trained, optimizer = accelerator.prepare(model, optimizer)
    step = TrainStep(accelerator, trained, optimizer, lr_scheduler, Progress(), EMA(model.parameters()))
    gradients = []
    optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in model.parameters()])
    )
    joint = JointCodeDistribution(model, lambda mean: accelerator.reduce(mean, "mean")) if is_joint else None

    def compute_losses(visits: list[int]) -> dict[str, torch.Tensor]:
        generators = [keyed_generator(0, "test", visit) for visit in visits]
        draws = FlowDraws.sample(load(visits), generators)
        return pretraining_loss(trained, load(visits), draws, weights=WEIGHTS, generator=generators)

    def load(visits: list[int]) -> torch.Tensor:
        images = [torch.rand(3, 16, 16, generator=keyed_generator(0, "image", visit)) for visit in visits]
        return torch.stack(images) * 2 - 1

    losses = []
    for number in range(STEPS):
        size = JOINT // accelerator.num_processes
        first = number * JOINT + accelerator.process_index * size
        visits = torch.arange(first, first + size).chunk(accumulation)
        batches = [part.tolist() for part in visits]
        if joint is not None and accumulation > 1:
            joint.observe(lambda images: trained(images=images), [load(batch) for batch in batches])
        found = step(batches, compute_losses)
        losses.append({name: accelerator.reduce(value, "mean") for name, value in found.items()})
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return {"losses": losses, "gradients": gradients, "weights": weights}


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Of all tensors together, relative to their length."""
    a, b = (torch.cat([tensor.flatten() for tensor in tensors]).double() for tensors in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("bits", [3, 14])
@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 2), (2, 2)])
def test_training_equals_the_joint_batch(tiny_config, bits, processes, accumulation):
    """Catches a distribution of one process, of one batch, or of the step before: another loss or another gradient."""
    config = tiny_config | (BITS_14 if bits == 14 else {})
    expected = train(config, 1, False)
    for found in on_processes(processes, train, config, accumulation, True):
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
        first, second = (distance(*pair) for pair in zip(found["gradients"], expected["gradients"], strict=True))
        assert first < 1e-6
        assert second < 1e-4  # sigmoids as sharp as these make more of how the weights were rounded
        assert distance(found["weights"], expected["weights"]) < 1e-6
    for found in on_processes(processes, train, config, accumulation, False):
        apart, whole = found["losses"][0], expected["losses"][0]
        assert apart["codebook_entropy"] < whole["codebook_entropy"] - 0.01
        torch.testing.assert_close(apart["flow_loss"], whole["flow_loss"], rtol=1e-5, atol=1e-6)
        assert distance(found["gradients"][0], expected["gradients"][0]) > 1e-3


def test_a_whole_batch_on_one_process_is_left_alone(tiny_config):
    """Catches --global_entropy that changes what has nothing to be joined with."""
    found = train(tiny_config, 1, True)
    with own_accelerators():
        expected = train(tiny_config, 1, False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_observing_leaves_no_trace(tiny_autoencoder):
    """Catches an extra pass that builds a graph, draws numbers or goes on to count batches of an earlier step."""
    model = tiny_autoencoder.train()
    joint = JointCodeDistribution(model, lambda mean: mean)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    state = torch.get_rng_state()
    known = []
    for batches in (images[:4].chunk(2), images[2:].chunk(2), images[:4].chunk(2)):
        joint.observe(lambda x: model(images=x), batches)
        assert not joint.known.requires_grad
        known.append(joint.known)
    assert torch.equal(known[0], known[2]) and not torch.equal(known[0], known[1])
    assert known[0].sum().item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("quantizer", ["fsq", "kl", "none"])
def test_other_quantizers_are_refused(tiny_config, quantizer):
    """Catches --global_entropy that is taken and does nothing."""
    model = FlowMoAutoencoder(**tiny_config | {"quantizer": quantizer})
    with pytest.raises(ValueError, match=f"needs quantizer=\"lfq\"; this model has '{quantizer}'"):
        JointCodeDistribution(model, lambda mean: mean)

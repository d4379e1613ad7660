"""What training minimises: the flow, its random draws, and both stages' losses with the gradients they give."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.objectives.distill import DistillationWeights, distillation_loss
from flowmo_diffusers.objectives.flow import FlowDraws, flow_loss, interpolate, one_step_estimate, thick_tailed
from flowmo_diffusers.objectives.posttrain import ChainDraws, chain_times, posttraining_loss, sample_chain
from flowmo_diffusers.objectives.pretrain import LossWeights, pretraining_loss


BATCH = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(x: torch.Tensor, seed: int = 0) -> list[torch.Generator]:
    """One an image."""
    return [keyed_generator(seed, "test", number) for number in range(len(x))]


def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A perceptual network's stand-in."""
    return (F.avg_pool2d(x, 4) - F.avg_pool2d(y, 4)).square().mean((1, 2, 3))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(BATCH, 3, 16, 16, generator=generator(1)) * 2 - 1


@pytest.fixture
def draws(x) -> FlowDraws:
    """With one image of three whose codes are dropped."""
    draws = FlowDraws.sample(x, generators(x, 2))
    draws.code_mask = torch.tensor([1.0, 0.0, 1.0])
    return draws


@pytest.fixture
def model(tiny_autoencoder) -> FlowMoAutoencoder:
    return tiny_autoencoder.train()


# The flow


def test_interpolation_ends_and_middle(x):
    """Catches time running the other way (t = 0 is the image), or one time for the whole batch."""
    z = torch.randn(x.shape, generator=generator())
    x_t = interpolate(x, z, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x_t[0], x[0]) and torch.equal(x_t[1], z[1])
    torch.testing.assert_close(x_t[2], 0.25 * z[2] + 0.75 * x[2])


def test_flow_loss(x):
    """Catches a velocity of the other sign, a sum in place of the mean, or arithmetic in the model's bfloat16."""
    z = torch.randn(x.shape, generator=generator())
    assert flow_loss(z - x, x, z) == 0
    assert flow_loss(z - x + 0.5, x, z).item() == pytest.approx(0.25, rel=1e-5)
    v = (z - x).bfloat16()
    assert flow_loss(v, x, z).dtype == torch.float32
    assert flow_loss(v, x, z).item() == pytest.approx((v.double() - (z - x).double()).square().mean().item(), rel=1e-4)


def test_one_step_estimate_is_the_image(x):
    """Catches an estimate that is not the image at the true velocity, at any time."""
    z = torch.randn(x.shape, generator=generator())
    for times in ([0.0, 0.3, 1.0], [0.999, 0.5, 1e-3]):
        t = torch.tensor(times)
        torch.testing.assert_close(one_step_estimate(interpolate(x, z, t), t, z - x), x, atol=1e-6, rtol=0)


# Random draws


def test_thick_tailed_branches():
    """Catches a selector that takes the wrong branch, or uniform draws that do not reach the noise level."""
    selector = torch.tensor([0.0, 0.9, 0.91, 1.0])
    t = thick_tailed(torch.tensor([0.0, 2.0, 0.0, 2.0]), selector, torch.tensor([0.9, 0.9, 0.7, 1.0]))
    torch.testing.assert_close(t, torch.tensor([0.5, 1 / (1 + math.exp(-2)), 0.7, 1.0]))


def test_thick_tailed_distribution():
    """Catches a tail of another mass: without it images discolour, with more of it details suffer."""
    count, g = 1_000_000, generator()
    t = thick_tailed(*(f(count, generator=g) for f in (torch.randn, torch.rand, torch.rand)))
    assert 0 <= t.min() and t.max() <= 1

    def normal_tail(deviations: float) -> float:
        return math.erfc(deviations / math.sqrt(2)) / 2

    for level in (0.5, 0.9, 0.99, 0.999):
        expected = 0.9 * normal_tail(math.log(level / (1 - level))) + 0.1 * (1 - level)
        tolerance = 5 * math.sqrt(expected / count)
        assert (t > level).float().mean().item() == pytest.approx(expected, abs=tolerance), level
        assert (t < 1 - level).float().mean().item() == pytest.approx(expected, abs=tolerance), level


def test_flow_draws_statistics():
    """Catches codes dropped too often or never, noise of another scale, or times that are all logit-normal."""
    x = torch.zeros(20_000, 1, 2, 2)
    draws = FlowDraws.sample(x, generators(x))
    assert set(draws.code_mask.tolist()) == {0, 1}
    assert draws.code_mask.mean().item() == pytest.approx(0.9, abs=0.01)
    assert (draws.z.mean().item(), draws.z.std().item()) == pytest.approx((0, 1), abs=0.01)
    assert draws.z.shape == (20_000, 1, 2, 2) and draws.t.shape == (20_000,)
    assert (draws.t > 0.99).float().mean().item() == pytest.approx(0.001, abs=0.001)
    assert (draws.t > 0.99).any() and draws.t.mean().item() == pytest.approx(0.5, abs=0.01)
    correlation = torch.corrcoef(torch.stack([draws.t, draws.code_mask, draws.z[:, 0, 0, 0]]))
    assert (correlation - torch.eye(3)).abs().max() < 0.03


def test_other_noise_levels():
    """Catches levels of one kind drawn as another, and other draws that change with them."""
    x = torch.zeros(20_000, 1, 1, 1)
    default = FlowDraws.sample(x, generators(x))
    logit_normal = FlowDraws.sample(x, generators(x), noise_levels="logit-normal")
    one = FlowDraws.sample(x, generators(x), noise_levels="one")
    assert (one.t == 1).all()
    deviations = logit_normal.t.logit()
    assert (deviations.mean().item(), deviations.std().item()) == pytest.approx((0, 1), abs=0.03)
    assert (default.t == logit_normal.t).float().mean().item() == pytest.approx(0.9, abs=0.01)
    for other in (logit_normal, one):
        assert torch.equal(other.z, default.z) and torch.equal(other.code_mask, default.code_mask)
    with pytest.raises(ValueError, match="noise_levels='uniform' must be one of"):
        FlowDraws.sample(x[:1], generators(x[:1]), noise_levels="uniform")


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_code_dropout(dropout, kept):
    """Catches a --code_dropout that is ignored, or that is the share of codes kept."""
    x = torch.zeros(4000, 1, 1, 1)
    draws = FlowDraws.sample(x, generators(x), dropout)
    assert draws.code_mask.mean().item() == pytest.approx(kept, abs=0.04 if 0 < kept < 1 else 0)


@pytest.mark.parametrize("sample", [FlowDraws.sample, ChainDraws.sample])
def test_draws_are_the_generators(sample):
    """Catches a draw from the global generator, which no resumed run and no other process repeats."""
    x = torch.zeros(100, 1, 2, 2)
    torch.manual_seed(0)
    first = vars(sample(x, generators(x, 5)))
    torch.manual_seed(1)
    second, other = vars(sample(x, generators(x, 5))), vars(sample(x, generators(x, 6)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_chain_times_by_hand():
    """Catches a grid that runs upwards, that the first draw moves, or whose steps are in another order."""
    u = torch.tensor([[0.3, 0.1, 0.2, 0.1], [0.9, 0.1, 0.2, 0.1], [0.5, 0.5, 0.25, 0.25]])
    expected = torch.tensor([[1, 0.75, 0.25, 0], [1, 0.75, 0.25, 0], [1, 0.75, 0.5, 0]])
    torch.testing.assert_close(chain_times(u), expected)


def test_chain_times_distribution(x):
    """Catches one grid for the whole batch, steps that are not interchangeable, or ends that are not 1 and 0."""
    many = torch.zeros(5000, 1, 1, 1)
    times = ChainDraws.sample(many, generators(many)).times
    assert times.shape == (5000, 9)
    assert (times[:, 0] == 1).all() and (times[:, -1] == 0).all()
    assert (times.diff(dim=1) < 0).all()
    torch.testing.assert_close(times.mean(0), torch.arange(8, -1, -1) / 8, atol=0.01, rtol=0)
    assert times[:, 4].std().item() == pytest.approx(0.1, abs=0.02)
    assert len(times[:, 4].unique()) > 4900
    assert ChainDraws.sample(x, generators(x), num_steps=1).times.tolist() == [[1, 0]] * BATCH


# The sampling chain


class StraightFlow(nn.Module):
    """The true velocity of a straight flow from `z` to `x`, which counts its calls."""

    def __init__(self, x: torch.Tensor, z: torch.Tensor):
        super().__init__()
        self.v, self.times = z - x, []

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, codes: torch.Tensor) -> SimpleNamespace:
        self.times.append(t)
        return SimpleNamespace(velocity=self.v)


@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_chain_reaches_the_image_at_the_true_velocity(x, num_steps):
    """Catches a step of the wrong sign or length, a last step left out, or a time that is not the sample's own."""
    chain = ChainDraws.sample(x, generators(x), num_steps)
    model = StraightFlow(x, chain.z)
    torch.testing.assert_close(sample_chain(model, None, chain), x, atol=2e-6, rtol=0)
    assert len(model.times) == num_steps
    assert torch.equal(torch.stack(model.times, dim=1), chain.times[:, :-1])


class LinearFlow(nn.Module):
    """v = a x_t + b t + the sum of the codes: a step depends on the parameters and on all steps before it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.4))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, codes: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(velocity=self.a * x_t + (self.b * t + codes.sum((1, 2)))[:, None, None, None])


def test_chain_of_a_batch_is_the_chains_of_its_samples(x):
    """Catches a step as long as the batch's mean step, which a constant velocity would not show."""
    model, chain = LinearFlow(), ChainDraws.sample(x, generators(x), 4)
    codes = torch.rand(BATCH, 4, 2, generator=generator())
    batch = sample_chain(model, codes, chain)
    for i in range(BATCH):
        own = slice(i, i + 1)
        torch.testing.assert_close(
            batch[own], sample_chain(model, codes[own], ChainDraws(chain.z[own], chain.times[own]))
        )


def test_gradient_through_every_step(x):
    """Catches a chain cut by a detach, or gradients of its last step alone."""
    model, chain = LinearFlow(), ChainDraws.sample(x, generators(x), 8)
    codes = torch.rand(BATCH, 4, 2, generator=generator())

    def loss() -> torch.Tensor:
        return sample_chain(model, codes, chain).square().mean()

    loss().backward()
    for parameter in (model.a, model.b):
        with torch.no_grad():
            value, eps = parameter.item(), 1e-2
            above, below = ((parameter.fill_(value + side * eps), loss().item())[1] for side in (1, -1))
            parameter.fill_(value)
        assert parameter.grad.item() == pytest.approx((above - below) / (2 * eps), rel=1e-3)


# Losses


def test_loss_weights():
    """Catches a term that only informs and is minimised, one term with another's weight, or a default that moved."""
    weights = LossWeights()
    assert vars(weights) == {"perceptual": 0.1, "entropy": 0.0025, "commit": 0.000625, "kl": 1.0}
    terms = {"entropy_loss": 2.0, "commit_loss": 4.0, "per_sample_entropy": 1e9, "codebook_entropy": 1e9}
    assert weights.quantizer(terms) == pytest.approx(0.0025 * 2 + 0.000625 * 4)
    assert LossWeights(entropy=3, commit=5).quantizer(terms) == 26
    assert LossWeights(kl=0.5).quantizer({"kl_loss": 8.0, "anything": 1e9}) == 4
    assert weights.quantizer({}) == 0


def build(config: dict, quantizer: str) -> FlowMoAutoencoder:
    """A model in training mode whose parameters are all random."""
    model = FlowMoAutoencoder(**config | {"quantizer": quantizer}).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator())
    return model


@pytest.mark.parametrize(
    ("quantizer", "named"),
    [("lfq", {"entropy_loss": 3.0, "commit_loss": 5.0}), ("kl", {"kl_loss": 7.0}), ("fsq", {}), ("none", {})],
)
def test_pretraining_total(tiny_config, x, draws, quantizer, named):
    """Catches a term missing from the total, weighted twice or by another's weight, with any quantizer."""
    weights = LossWeights(perceptual=2.0, entropy=3.0, commit=5.0, kl=7.0)
    model = build(tiny_config, quantizer)
    losses = pretraining_loss(model, x, draws, distance, weights, generator())
    assert set(named) <= set(losses)
    total = losses["flow_loss"] + 2 * losses["perceptual_loss"] + sum(named[name] * losses[name] for name in named)
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())


def test_pretraining_terms(model, x, draws):
    """Catches draws that do not reach the model, or a perceptual term of something else than the one-step estimate."""
    losses = pretraining_loss(model, x, draws, distance)
    x_t = interpolate(x, draws.z, draws.t)
    v = model(x_t, draws.t, codes=model(images=x).codes, code_mask=draws.code_mask).velocity
    torch.testing.assert_close(losses["flow_loss"], (v - (draws.z - x)).square().mean())
    estimate = x_t - draws.t[:, None, None, None] * v
    torch.testing.assert_close(losses["perceptual_loss"], distance(x, estimate).mean())


def test_pretraining_without_a_perceptual_network(model, x, draws):
    """Catches --perceptual none that still adds a term, or that changes the others."""
    without, with_it = pretraining_loss(model, x, draws), pretraining_loss(model, x, draws, distance)
    assert set(with_it) - set(without) == {"perceptual_loss"}
    torch.testing.assert_close(without["loss"], with_it["loss"] - 0.1 * with_it["perceptual_loss"])


@pytest.mark.parametrize("quantizer", ["lfq", "fsq", "kl", "none"])
def test_pretraining_reaches_every_parameter(tiny_config, x, draws, quantizer):
    """Catches a quantizer that cuts the encoder off from the flow loss, and parameters that nothing trains."""
    model = build(tiny_config, quantizer)
    pretraining_loss(model, x, draws, None, LossWeights(entropy=0, commit=0, kl=0), generator())["loss"].backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untrained == []


def test_dropped_codes_give_the_encoder_no_gradient(model, x, draws):
    """Catches code dropout that hides the codes from the decoder but still trains the encoder by them."""
    draws.code_mask = torch.zeros(BATCH)
    weights = LossWeights(entropy=0, commit=0)
    pretraining_loss(model, x, draws, distance, weights)["loss"].backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
    assert all(p.grad.any() for name, p in model.decoder.named_parameters() if "token" not in name)


@pytest.fixture
def chain(x) -> ChainDraws:
    return ChainDraws.sample(x, generators(x, 3), num_steps=3)


@pytest.mark.parametrize(
    ("quantizer", "named"),
    [("lfq", {"entropy_loss": 3.0, "commit_loss": 5.0}), ("kl", {"kl_loss": 7.0}), ("fsq", {}), ("none", {})],
)
def test_posttraining_total(tiny_config, x, draws, chain, quantizer, named):
    """Catches a term missing from the total, or a weight that is not the sample loss's."""
    model = build(tiny_config, quantizer)
    weights = LossWeights(perceptual=2.0, entropy=3.0, commit=5.0, kl=7.0)
    losses = posttraining_loss(model, x, draws, chain, distance, weights, generator())
    total = losses["flow_loss"] + 2 * losses["sample_loss"] + sum(named[name] * losses[name] for name in named)
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-6)


def test_posttraining_trains_the_decoder_alone(model, x, draws, chain):
    """Catches gradients that reach the encoder even where it is not frozen, or that miss part of the decoder."""
    posttraining_loss(model, x, draws, chain, distance, LossWeights())["loss"].backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad.any() for parameter in model.decoder.parameters())


def test_sample_loss_trains_by_itself(model, x, draws, chain):
    """Catches a sample loss that only informs: with the flow loss taken off, the decoder still has gradients."""
    losses = posttraining_loss(model, x, draws, chain, distance, LossWeights(perceptual=10.0))
    (losses["loss"] - losses["flow_loss"]).backward()
    assert all(parameter.grad.any() for parameter in model.decoder.parameters())


def test_chain_never_drops_codes(model, x, draws, chain):
    """Catches the flow loss's code dropout reaching the chain, whose samples then have nothing to do with x."""
    results = []
    for mask in (torch.zeros(BATCH), torch.ones(BATCH)):
        draws.code_mask = mask
        results.append(posttraining_loss(model, x, draws, chain, distance, LossWeights()))
    assert results[0]["flow_loss"] != results[1]["flow_loss"]
    assert torch.equal(results[0]["sample_loss"], results[1]["sample_loss"])
    with torch.no_grad():
        sample = sample_chain(model, model(images=x).codes, chain)
    torch.testing.assert_close(results[0]["sample_loss"], distance(x, sample).mean())


# Stage 1C


@pytest.fixture
def target(x) -> torch.Tensor:
    return x.flip(0) * 0.5


def codes_of(model: FlowMoAutoencoder, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images=x).codes


def test_distillation_by_hand(model, x, draws, chain, target):
    """Catches a sample that is not the chain's, a distance to the wrong image, or a weight of another term."""
    codes = codes_of(model, x)
    weights = DistillationWeights(sample=2.0, perceptual=3.0, image=5.0, flow=7.0)
    losses = distillation_loss(model, x, codes, target, draws, chain, distance, weights)
    y = sample_chain(model, codes, chain)
    expected = {
        "sample_loss": (y - target).square().mean(),
        "perceptual_loss": distance(y, target).mean(),
        "image_loss": distance(y, x).mean(),
        "flow_loss": posttraining_loss(model, x, draws, chain, distance, LossWeights())["flow_loss"],
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    total = 2 * losses["sample_loss"] + 3 * losses["perceptual_loss"] + 5 * losses["image_loss"]
    torch.testing.assert_close(losses["loss"], total + 7 * losses["flow_loss"])


def test_distillation_leaves_out_what_has_no_weight(model, x, draws, chain, target):
    """Catches a term that is computed for nothing, and one that is there without a network."""
    codes = codes_of(model, x)
    for perceptual, weights, names in (
        (None, DistillationWeights(), {"loss", "sample_loss", "flow_loss"}),
        (distance, DistillationWeights(image=0, flow=0), {"loss", "sample_loss", "perceptual_loss"}),
        (distance, DistillationWeights(perceptual=0), {"loss", "sample_loss", "image_loss", "flow_loss"}),
    ):
        assert distillation_loss(model, x, codes, target, draws, chain, perceptual, weights).keys() == names


def test_distillation_trains_the_decoder_through_every_step(model, x, draws, chain, target):
    """Catches a chain whose first steps have no gradient, and terms that only inform."""
    codes = codes_of(model, x)
    asked = []
    model.register_forward_hook(lambda module, args, output: asked.append(output.velocity))
    weights = DistillationWeights(flow=0)
    loss = distillation_loss(model, x, codes, target, draws, chain, None, weights)["loss"]
    gradients = torch.autograd.grad(loss, asked, retain_graph=True)
    assert len(asked) == 3 and all(gradient.any() for gradient in gradients)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad.any() for parameter in model.decoder.parameters())


def test_posttraining_under_gradient_checkpointing(model, x, draws, chain):
    """Catches a checkpointed chain with other gradients than the plain one, or checkpointing that does nothing."""
    calls, gradients = [], []
    model.decoder.blocks[0].register_forward_pre_hook(lambda *_: calls.append(None))
    for enable in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        enable()
        model.zero_grad()
        calls.clear()
        losses = posttraining_loss(model, x, draws, chain, distance, LossWeights())
        losses["loss"].backward()
        gradients.append((losses["loss"], {name: p.grad for name, p in model.decoder.named_parameters()}, len(calls)))
    (plain_loss, plain, plain_calls), (loss, checkpointed, all_calls) = gradients
    assert (plain_calls, all_calls) == (4, 8)
    assert torch.equal(loss, plain_loss)
    torch.testing.assert_close(checkpointed, plain)

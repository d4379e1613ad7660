"""What a token generator minimises, and that its likelihoods are those of a distribution."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from token_models import build_generator, random_indices
from torch import nn

from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.objectives.tokens import TokenDraws, log_likelihood, mask_groups, masked_losses, token_loss
from flowmo_diffusers.schedulers.scheduling_flowmo_tokens import MASK_SCHEDULES


LABELS = torch.tensor([0, 1, 2, 0])


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [keyed_generator(seed, "tokens", number) for number in range(count)]


def fixed_draws(masked: torch.Tensor, labels: torch.Tensor = LABELS) -> TokenDraws:
    return TokenDraws(masked, labels[: len(masked)])


class Recorder(nn.Module):
    """Stands in for a generator: keeps what it is asked and answers with given logits."""

    def __init__(self, logits: torch.Tensor, order: str = "masked"):
        super().__init__()
        self.logits = logits
        self.config = SimpleNamespace(order=order)
        self.asked = []

    def forward(self, indices: torch.Tensor, class_labels: torch.Tensor) -> SimpleNamespace:
        self.asked.append((indices, class_labels))
        return SimpleNamespace(logits=self.logits)


def known_logits(indices: torch.Tensor, values: int = 8, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*indices.shape, values, generator=torch.Generator().manual_seed(seed))


# Draws


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_masked_share_follows_the_schedule(schedule):
    """Catches a ratio that is drawn uniform whatever the schedule, rounded down, or the same for a batch."""
    indices = torch.zeros(4000, 8, 2, dtype=torch.long)
    masked = TokenDraws.sample(indices, torch.zeros(4000), 3, generators(4000), schedule).masked
    counts = masked.flatten(1).sum(1)
    assert counts.min() == 1 and counts.max() == 16
    # E[ceil(16 m(r))] is half a group over 16 E[m(r)].
    mean = {"cosine": 2 / math.pi, "arccos": 2 / math.pi, "linear": 0.5}[schedule]
    assert counts.float().mean().item() == pytest.approx(16 * mean + 0.5, abs=0.3)
    # The quarter of images that is furthest on has the fewest: the schedule at r = 3/4.
    quarter = {"cosine": math.cos(math.pi * 3 / 8), "arccos": math.acos(0.75) / (math.pi / 2), "linear": 0.25}[
        schedule
    ]
    assert counts.float().quantile(0.25).item() == pytest.approx(16 * quarter, abs=1.0)
    # No place is favoured.
    places = masked.float().mean(0)
    assert (places - places.mean()).abs().max() < 0.035


def test_class_dropout_is_a_share_of_the_images():
    """Catches labels that are all or never dropped, or dropped to a class that exists."""
    indices, labels = torch.zeros(4000, 8, 2, dtype=torch.long), torch.arange(4000) % 3
    for share in (0.0, 0.1, 1.0):
        kept = TokenDraws.sample(indices, labels, 3, generators(4000), class_dropout=share).class_labels
        dropped = kept == 3
        assert torch.equal(kept[~dropped], labels[~dropped]) and kept.dtype == torch.int64
        assert dropped.float().mean().item() == pytest.approx(share, abs=0.015 if share == 0.1 else 0)


def test_draws_of_an_image_are_its_own():
    """Catches draws that depend on the batch: a run on other processes, or resumed, would go another way."""
    indices = torch.zeros(6, 8, 2, dtype=torch.long)
    labels = torch.arange(6)
    whole = TokenDraws.sample(indices, labels, 9, generators(6), class_dropout=0.5)
    for first, last in ((0, 1), (1, 4), (4, 6)):
        part = TokenDraws.sample(
            indices[first:last], labels[first:last], 9, generators(6)[first:last], class_dropout=0.5
        )
        assert torch.equal(part.masked, whole.masked[first:last])
        assert torch.equal(part.class_labels, whole.class_labels[first:last])
    assert len(whole.masked.flatten(1).unique(dim=0)) > 3
    with pytest.raises(ValueError, match="generator is a list of 2"):
        TokenDraws.sample(indices, labels, 9, generators(2))


def test_the_first_of_an_order_are_masked():
    """Catches ranks and places exchanged."""
    order = torch.tensor([[0.3, 0.1, 0.4, 0.2], [0.0, 0.9, 0.8, 0.7]])
    masked = mask_groups(torch.zeros(2, 2, 2), order, torch.tensor([2, 3]))
    assert masked.int().tolist() == [[[0, 1], [0, 1]], [[1, 0], [1, 1]]]


# The loss


def test_hidden_groups_are_hidden():
    """Catches a value that is to be predicted and is shown, or one that is known and is not."""
    indices = random_indices(build_generator(), 4)
    draws = TokenDraws.sample(indices, LABELS, 3, generators(4), class_dropout=0.5)
    model = Recorder(known_logits(indices))
    token_loss(model, indices, draws)
    ((shown, labels),) = model.asked
    assert (shown[draws.masked] == -1).all() and torch.equal(shown[~draws.masked], indices[~draws.masked])
    assert torch.equal(labels, draws.class_labels) and (indices >= 0).all()
    ordered = Recorder(known_logits(indices), "autoregressive")
    token_loss(ordered, indices, draws, order="autoregressive")
    assert torch.equal(ordered.asked[0][0], indices)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_loss_is_cross_entropy_of_the_hidden_groups(smoothing):
    """Catches groups that are known counted in, or smoothing of another form, against PyTorch's."""
    indices = random_indices(build_generator(), 4)
    draws, logits = TokenDraws.sample(indices, LABELS, 3, generators(4)), known_logits(indices)
    found = token_loss(Recorder(logits), indices, draws, label_smoothing=smoothing)
    images = zip(logits, indices, draws.masked, strict=True)
    losses = [
        (F.cross_entropy(z[m], x[m], label_smoothing=smoothing), F.cross_entropy(z[m], x[m])) for z, x, m in images
    ]
    smoothed, plain = torch.tensor(losses).mean(0)
    torch.testing.assert_close(found["loss"], smoothed)
    torch.testing.assert_close(found["token_loss"], plain)
    right = [(z[m].argmax(-1) == x[m]).float().mean() for z, x, m in zip(logits, indices, draws.masked, strict=True)]
    torch.testing.assert_close(found["accuracy"], torch.stack(right).mean())
    assert found.keys() == {"loss", "token_loss", "accuracy"}


def test_images_weigh_the_same():
    """Catches a mean over groups: images with much hidden would count more, and parts not average to the whole."""
    indices = random_indices(build_generator(), 4)
    logits = known_logits(indices)
    masked = torch.zeros(4, 8, 2, dtype=torch.bool)
    masked[0, 0, 0] = masked[1] = masked[2, :3] = masked[3, 5:, 1] = True
    whole = token_loss(Recorder(logits), indices, fixed_draws(masked))
    for size in (1, 2):
        parts = [
            token_loss(Recorder(logits[i : i + size]), indices[i : i + size], fixed_draws(masked[i : i + size]))
            for i in range(0, 4, size)
        ]
        for name, value in whole.items():
            torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), value)


def test_every_group_counts_in_order():
    """Catches an autoregressive loss that is only of the groups that a masked model would hide."""
    indices = random_indices(build_generator(), 4)
    logits = known_logits(indices)
    draws = TokenDraws.sample(indices, LABELS, 3, generators(4))
    found = token_loss(Recorder(logits, "autoregressive"), indices, draws, "autoregressive", label_smoothing=0.1)
    expected = F.cross_entropy(logits.flatten(0, 2), indices.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found["loss"], expected)


def test_only_the_loss_has_a_gradient():
    """Catches figures of the log that keep the graph, and a loss that has none."""
    model = build_generator()
    indices = random_indices(model, 4)
    found = token_loss(model, indices, TokenDraws.sample(indices, LABELS, 3, generators(4)))
    assert [name for name, value in found.items() if value.requires_grad] == ["loss"]
    assert all(value.ndim == 0 and value.dtype == torch.float32 for value in found.values())


# Losses at one ratio


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 1), (0.01, 1), (0.25, 4), (0.5, 8), (0.9, 14), (1.0, 16)])
def test_losses_at_one_ratio(ratio, count):
    """Catches another number of hidden groups, a mean over all of them, or images whose places are the same."""
    indices = random_indices(build_generator(), 4)
    model = Recorder(known_logits(indices))
    losses = masked_losses(model, indices, LABELS, ratio, generators(4))
    ((shown, labels),) = model.asked
    hidden = shown == -1
    assert (hidden.flatten(1).sum(1) == count).all() and torch.equal(labels, LABELS)
    assert torch.equal(shown[~hidden], indices[~hidden])
    images = zip(model.logits, indices, hidden, strict=True)
    torch.testing.assert_close(losses, torch.stack([F.cross_entropy(z[m], x[m]) for z, x, m in images]))
    assert ratio in (0.0, 1.0) or len(hidden.flatten(1).unique(dim=0)) > 1


# Likelihoods


def every_image(tokens: int, groups: int, bits: int) -> torch.Tensor:
    """All (2^bits)^(tokens * groups) of them."""
    values = itertools.product(range(2**bits), repeat=tokens * groups)
    return torch.tensor(list(values)).reshape(-1, tokens, groups)


def assert_distribution(log_p: torch.Tensor) -> None:
    """Sums to 1 and is far from uniform, which anything normalised by halves could be as well."""
    assert log_p.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_p.max() - log_p.min() > 3


@pytest.mark.parametrize(("groups", "bits"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("label", [0, 3])
def test_autoregressive_likelihoods_sum_to_one(groups, bits, label):
    """Catches a group that is predicted from itself or from a later one: the sum would not be 1."""
    model = build_generator(0.4, order="autoregressive", num_tokens=4, token_groups=groups, group_bits=bits)
    images = every_image(4, groups, bits)
    assert len(images) == 256
    assert_distribution(log_likelihood(model, images, torch.full((256,), label)))


@pytest.mark.parametrize(("groups", "bits"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_masked_likelihoods_sum_to_one(groups, bits, seed):
    """Catches a group that is seen while it is predicted, in any order of steps, of one group or of many."""
    model = build_generator(0.4, num_tokens=4, token_groups=groups, group_bits=bits)
    generator = torch.Generator().manual_seed(seed)
    one_by_one = torch.randperm(4 * groups, generator=generator).reshape(4, groups)
    in_three = torch.randint(3, (4, groups), generator=generator)
    found = []
    for steps in (one_by_one, in_three, torch.zeros(4, groups, dtype=torch.long)):
        found.append(log_likelihood(model, every_image(4, groups, bits), torch.full((256,), 1), steps))
        assert_distribution(found[-1])
    assert not torch.allclose(found[0], found[1], atol=0.1)  # other orders, other distributions


def test_masked_likelihood_by_hand():
    """Catches steps that are taken in another order than they are given, or predictions from the wrong step."""
    model = build_generator(num_tokens=2)
    indices, labels = random_indices(model, 1), torch.tensor([1])
    steps = torch.tensor([[5, 0], [2, 2]])
    total = 0.0
    for shown, revealed in (([], [(0, 1)]), ([(0, 1)], [(1, 0), (1, 1)]), ([(0, 1), (1, 0), (1, 1)], [(0, 0)])):
        known = torch.full_like(indices, -1)
        for token, group in shown:
            known[0, token, group] = indices[0, token, group]
        log_p = model(known, labels).logits[0].log_softmax(-1)
        total += sum(log_p[token, group, indices[0, token, group]].item() for token, group in revealed)
    assert log_likelihood(model, indices, labels, steps).item() == pytest.approx(total, abs=1e-4)


def test_autoregressive_likelihood_is_the_loss():
    """Catches a likelihood and a loss of which one is a mean, smoothed, or in bits."""
    model = build_generator(order="autoregressive")
    indices = random_indices(model, 4)
    found = log_likelihood(model, indices, LABELS)
    assert found.shape == (4,) and not found.requires_grad
    loss = token_loss(model, indices, fixed_draws(torch.ones(4, 8, 2).bool()), "autoregressive")["token_loss"]
    torch.testing.assert_close(-found.mean() / 16, loss.detach())


def test_mean_over_random_orders_is_the_bound():
    """Catches a bound that is none: losses at all ratios average to the likelihood over random orders."""
    model = build_generator(num_tokens=2, group_bits=1)
    image, label = random_indices(model, 1), torch.tensor([0])
    orders = [torch.tensor(order).reshape(2, 2) for order in itertools.permutations(range(4))]
    expected = -torch.stack([log_likelihood(model, image, label, steps) for steps in orders]).mean()
    count = 3000
    images, labels = image.expand(count, -1, -1), label.expand(count)
    losses = [masked_losses(model, images, labels, k / 4, generators(count, seed=k)).mean() for k in (1, 2, 3, 4)]
    assert 4 * torch.stack(losses).mean().item() == pytest.approx(expected.item(), rel=0.02)


def test_orders_that_do_not_fit_are_refused():
    """Catches an order that is passed over, or a masked model that is given none."""
    for order, steps in (("masked", None), ("autoregressive", torch.zeros(8, 2))):
        model = build_generator(order=order)
        with pytest.raises(ValueError, match="steps.*masked model needs"):
            log_likelihood(model, random_indices(model, 4), LABELS, steps)

"""What a token generator minimises: cross-entropy of groups of bits, masked or in order; and exact likelihoods."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flowmo_diffusers.engine.seeding import draw_uniform
from flowmo_diffusers.models.token_generator import MASK
from flowmo_diffusers.schedulers.scheduling_flowmo_tokens import mask_ratio


def mask_groups(indices: torch.Tensor, order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Where (b, tokens, groups) the first `count` (b,) groups of each image in an `order` (b, tokens * groups) are."""
    rank = order.argsort(dim=1).argsort(dim=1)
    return (rank < count[:, None]).reshape(indices.shape)


@dataclass
class TokenDraws:
    """
    Everything random in the loss of one batch.

    Args:
        masked: (b, tokens, groups) bool: groups that are hidden and to be predicted, at least one an image.
        class_labels: (b,) the labels, some of them replaced by the null class for classifier-free guidance.
    """

    masked: torch.Tensor
    class_labels: torch.Tensor

    @classmethod
    def sample(
        cls,
        indices: torch.Tensor,
        class_labels: torch.Tensor,
        null_class: int,
        generators: list[torch.Generator],
        mask_schedule: str = "arccos",
        class_dropout: float = 0.1,
    ) -> "TokenDraws":
        """Draws for tokens (b, tokens, groups), one generator an image: its draws do not depend on its batch."""
        b, total = len(indices), indices[0].numel()
        r, drop = draw_uniform((b, 2), generators, indices.device).unbind(1)
        count = torch.ceil(mask_ratio(r, mask_schedule) * total).clamp(1, total)
        masked = mask_groups(indices, draw_uniform((b, total), generators, indices.device), count)
        return cls(masked, torch.where(drop < class_dropout, null_class, class_labels))


def cross_entropy(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """-log p of the indices (b, tokens, groups) under logits (b, tokens, groups, values), in nats and float32."""
    losses = F.cross_entropy(logits.float().flatten(0, -2), indices.flatten(), reduction="none")
    return losses.reshape(indices.shape)


def _image_means(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """
    Over the groups that count, an image; then over images. So each image counts the same, however much of it is
    masked, and parts of a batch average to the whole.
    """
    return ((values * where).flatten(1).sum(1) / where.flatten(1).sum(1)).mean()


def token_loss(
    model: torch.nn.Module,
    indices: torch.Tensor,
    draws: TokenDraws,
    order: str = "masked",
    label_smoothing: float = 0.1,
) -> dict[str, torch.Tensor]:
    """
    Cross-entropy of the groups that are masked given those that are not; for an autoregressive model, of every group
    given those before it (`draws.masked` is then not read).

    Args:
        model: A [`FlowMoTokenGenerator`], wrapped or not.
        indices: (b, tokens, groups) int64.
        order: Of the model.

    Returns:
        Scalars by name: "loss" to be minimised, and without smoothing "token_loss" in nats a group and "accuracy".
    """
    masked = draws.masked if order == "masked" else torch.ones_like(draws.masked)
    shown = indices.masked_fill(masked, MASK) if order == "masked" else indices
    logits = model(shown, draws.class_labels).logits
    log_p = logits.float().log_softmax(-1)
    token = _image_means(-log_p.gather(-1, indices[..., None]).squeeze(-1), masked)
    # The target is 1 - s at the true value, and s spread evenly over all.
    loss = (1 - label_smoothing) * token + label_smoothing * _image_means(-log_p.mean(-1), masked)
    accuracy = _image_means((logits.detach().argmax(-1) == indices).float(), masked)
    return {"loss": loss, "token_loss": token.detach(), "accuracy": accuracy}


@torch.no_grad()
def masked_losses(
    model: torch.nn.Module,
    indices: torch.Tensor,
    class_labels: torch.Tensor,
    ratio: float,
    generators: list[torch.Generator],
) -> torch.Tensor:
    """
    Cross-entropy in nats a group (b,) at one masking ratio, of groups hidden at random. Its mean over ratios uniform
    in [0, 1], times the number of groups, bounds the negative log-likelihood of an image from above: it is that of an
    image revealed group by group in a random order.
    """
    total = indices[0].numel()
    count = torch.full((len(indices),), min(max(round(ratio * total), 1), total), device=indices.device)
    masked = mask_groups(indices, draw_uniform((len(indices), total), generators, indices.device), count)
    losses = cross_entropy(model(indices.masked_fill(masked, MASK), class_labels).logits, indices)
    return (losses * masked).flatten(1).sum(1) / masked.flatten(1).sum(1)


@torch.no_grad()
def log_likelihood(
    model: torch.nn.Module, indices: torch.Tensor, class_labels: torch.Tensor, steps: torch.Tensor | None = None
) -> torch.Tensor:
    """
    log p(tokens | class) in nats (b,), exact and normalised: the sum of p over all possible tokens is 1.

    Args:
        model: A [`FlowMoTokenGenerator`].
        indices: (b, tokens, groups) int64.
        class_labels: (b,) int64.
        steps: (tokens, groups) int64, needed by a masked model: at which step each group is revealed. Groups of one
            step are independent given all those of earlier ones. An autoregressive model has its own order.

    Raises:
        ValueError: If `steps` is missing or superfluous.
    """
    masked = model.config.order == "masked"
    if masked == (steps is None):
        raise ValueError("steps: a masked model needs the step at which each group is revealed, another has none")
    if not masked:
        return -cross_entropy(model(indices, class_labels).logits, indices).flatten(1).sum(1)
    total = torch.zeros(len(indices), device=indices.device)
    for step in steps.unique().tolist():
        logits = model(indices.masked_fill(steps >= step, MASK), class_labels).logits
        total -= (cross_entropy(logits, indices) * (steps == step)).flatten(1).sum(1)
    return total

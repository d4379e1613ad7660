"""Token generators small enough to run in milliseconds."""

import torch

from flowmo_diffusers import FlowMoTokenGenerator


TINY = {
    "num_tokens": 8,
    "token_groups": 2,
    "group_bits": 3,
    "num_classes": 3,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
}


def build_generator(noise: float = 0.2, **changes) -> FlowMoTokenGenerator:
    """Of the tokens of `tiny_autoencoder`, the same each time, with noise on every parameter: all of it matters."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = FlowMoTokenGenerator(**{**TINY, **changes})
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model.eval()


def random_indices(model: FlowMoTokenGenerator, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Tokens (batch, tokens, groups) of such a generator, none of them masked."""
    config = model.config
    shape = (batch, config.num_tokens, config.token_groups)
    return torch.randint(2**config.group_bits, shape, generator=torch.Generator().manual_seed(seed))

"""Random numbers that depend on where a run is, not on how it got there."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch


Generators = torch.Generator | list[torch.Generator] | None


def keyed_generator(seed: int, purpose: str, index: int, device: str | torch.device = "cpu") -> torch.Generator:
    """
    A generator for one thing of one kind, say the noise of the visit with this index: its draws are the same whatever
    was drawn before, on however many processes a run is spread, and whether or not it was resumed.

    Args:
        seed: Of the run, not negative.
        purpose: What the numbers are for; streams of different purposes are independent.
        index: Which one, not negative.
    """
    state = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), index]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


def draw_uniform(shape: Sequence[int], generator: Generators, device: str | torch.device) -> torch.Tensor:
    """
    Uniform numbers in [0, 1), float32.

    Args:
        shape: (b, ...).
        generator: One, or one for each of the b rows, whose numbers then do not depend on the batch they are in.

    Raises:
        ValueError: If it is a list of another length.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.rand(tuple(shape), generator=generator, device=source).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"generator is a list of {len(generator)}; expected one for each of {shape[0]} rows")
    rows = [torch.rand(tuple(shape[1:]), generator=one, device=one.device) for one in generator]
    return torch.stack(rows).to(device)

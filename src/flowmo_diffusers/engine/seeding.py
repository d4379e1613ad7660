"""Random numbers that depend on where a run is, not on how it got there."""

import zlib

import numpy as np
import torch


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

"""Random numbers that depend on where a run is, not on how it got there."""

import numpy as np
import torch


def step_generator(seed: int, step: int, process: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator for one step of one process: the draws of a step are the same whether or not a run was resumed."""
    state = np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))

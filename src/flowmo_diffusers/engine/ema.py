"""Exponential moving average of the weights."""

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel


class EMA(EMAModel):
    """
    diffusers' [`EMAModel`] at the cadence of the published training: one update every `update_every` steps with
    decay^update_every, the constant decay from the first update on (no warm-up). Frozen parameters are copied.

    Args:
        parameters: What is averaged.
        decay: Decay of one step.
        update_every: Steps between updates; step 0 is the first.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float = 0.9999, update_every: int = 10):
        per_update = decay**update_every
        # `update_after_step=-1`: otherwise the first update would copy the weights instead of averaging them.
        super().__init__(parameters, decay=per_update, min_decay=per_update, update_after_step=-1, foreach=True)
        self.update_every = update_every

    def update(self, parameters: Iterable[torch.nn.Parameter], step: int) -> None:
        """To be called after every optimiser step with that step's number, counted from 0."""
        if step % self.update_every == 0:
            self.step(parameters)

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Takes over the averages, each to the device of its predecessor; decay and cadence stay as they are here.

        Raises:
            ValueError: If the state is of parameters of other shapes.
        """
        old, new = self.shadow_params, state_dict["shadow_params"]
        if [p.shape for p in old] != [p.shape for p in new]:
            raise ValueError(f"state holds {len(new)} averages, which do not fit the {len(old)} parameters")
        super().load_state_dict({"optimization_step": state_dict["optimization_step"]})
        # Accelerate loads every state on the CPU.
        self.shadow_params = [n.to(o.device, copy=True) for o, n in zip(old, new, strict=True)]

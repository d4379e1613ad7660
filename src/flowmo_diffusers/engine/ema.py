"""Exponential moving average of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from flowmo_diffusers.engine.sharding import like, local, whole


class EMA(EMAModel):
    """
    diffusers' [`EMAModel`] at the cadence of the published training: one update every `update_every` steps with
    decay^update_every, the constant decay from the first update on (no warm-up). Frozen parameters are copied.

    Args:
        parameters: What is averaged. Under FSDP2 those of the sharded model: make this object after
            `Accelerator.prepare`.
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
            averages = self.shadow_params
            self.shadow_params = local(averages)  # sharded tensors lack some of the operations
            self.step(local(list(parameters)))
            self.shadow_params = averages

    @contextmanager
    def applied(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """Within this context the parameters hold the averages, and the averages the parameters."""
        parameters = list(parameters)
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    @torch.no_grad()
    def _swap(self, parameters: list[torch.nn.Parameter]) -> None:
        # One at a time: no second copy of the model is ever held.
        for parameter, average in zip(parameters, self.shadow_params, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)

    def state_dict(self) -> dict:
        """The averages, whole (under FSDP2 every process must call this), and the number of updates."""
        averages = [whole(average) for average in self.shadow_params]
        return {"optimization_step": self.optimization_step, "shadow_params": averages}

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Takes over the averages, each to the place of its predecessor; decay and cadence stay as they are here.

        Raises:
            ValueError: If the state is of parameters of other shapes.
        """
        old, new = self.shadow_params, state_dict["shadow_params"]
        if [p.shape for p in old] != [p.shape for p in new]:
            raise ValueError(f"state holds {len(new)} averages, which do not fit the {len(old)} parameters")
        super().load_state_dict({"optimization_step": state_dict["optimization_step"]})
        self.shadow_params = [like(n, o) for o, n in zip(old, new, strict=True)]

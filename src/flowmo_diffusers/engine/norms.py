"""Weight norms held at their initial values."""

from collections.abc import Iterable

import torch

from flowmo_diffusers.engine.sharding import local, norms


class NormRescaler:
    """
    Rescales weight matrices to the Frobenius norms they had when this object was made (in the manner of EDM2, paper
    section 3.2). To be called after every optimiser step. Frozen weights are left alone, bit for bit.

    Args:
        weights: The matrices, each rescaled as a whole. Under FSDP2 those of the sharded model: make this object after
            `Accelerator.prepare`.
    """

    def __init__(self, weights: Iterable[torch.Tensor]):
        self.weights = list(weights)
        with torch.no_grad():
            self.norms = norms(self.weights)

    @torch.no_grad()
    def step(self) -> None:
        pairs = [(weight, norm) for weight, norm in zip(self.weights, self.norms, strict=True) if weight.requires_grad]
        if pairs:
            weights, references = (list(part) for part in zip(*pairs, strict=True))
            ratios = norms(weights)
            torch._foreach_div_(ratios, references)
            torch._foreach_div_(local(weights), ratios)
            # DeepSpeed takes the next step from copies of its own, each process from its share of them.
            for weight, ratio in zip(weights, ratios, strict=True):
                if getattr(weight, "_hp_mapping", None) is not None:
                    weight._hp_mapping.get_hp_fragment().div_(ratio)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"norms": torch.stack(self.norms)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises `ValueError` if the state is of another number of weights."""
        if len(state["norms"]) != len(self.weights):
            raise ValueError(f"state holds norms of {len(state['norms'])} weights; this model has {len(self.weights)}")
        self.norms = list(state["norms"].to(self.norms[0]).unbind())

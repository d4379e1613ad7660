"""Weight norms held at their initial values."""

from collections.abc import Iterable

import torch


class NormRescaler:
    """
    Rescales weight matrices to the Frobenius norms they had when this object was made (in the manner of EDM2, paper
    section 3.2). To be called after every optimiser step. Frozen weights are left alone, bit for bit.

    Args:
        weights: The matrices, each rescaled as a whole.
    """

    def __init__(self, weights: Iterable[torch.Tensor]):
        self.weights = list(weights)
        with torch.no_grad():
            self.norms = torch._foreach_norm(self.weights)

    @torch.no_grad()
    def step(self) -> None:
        pairs = [(weight, norm) for weight, norm in zip(self.weights, self.norms, strict=True) if weight.requires_grad]
        if pairs:
            weights, norms = (list(part) for part in zip(*pairs, strict=True))
            current = torch._foreach_norm(weights)
            torch._foreach_div_(current, norms)
            torch._foreach_div_(weights, current)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"norms": torch.stack(self.norms)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises `ValueError` if the state is of another number of weights."""
        if len(state["norms"]) != len(self.weights):
            raise ValueError(f"state holds norms of {len(state['norms'])} weights; this model has {len(self.weights)}")
        self.norms = list(state["norms"].to(self.norms[0]).unbind())

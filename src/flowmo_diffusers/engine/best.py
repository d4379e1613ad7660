"""The best weights so far, and when to stop looking for better ones."""

from typing import Any


class Best:
    """
    Follows a figure of which less is better over the validations of a run.

    Args:
        patience: Validations in a row without a better value after which a run is to stop; `None` never.
    """

    def __init__(self, patience: int | None = None):
        self.patience = patience
        self.value = float("inf")
        self.step: int | None = None
        self.validations_since = 0

    def update(self, value: float, step: int) -> bool:
        """Whether `value`, of this step, is the best so far. What is not a number never is."""
        improved = value < self.value
        if improved:
            self.value, self.step, self.validations_since = value, step, 0
        else:
            self.validations_since += 1
        return improved

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.validations_since >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "validations_since": self.validations_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

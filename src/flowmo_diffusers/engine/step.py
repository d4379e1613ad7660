"""One optimiser step, the same for every kind of training."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from flowmo_diffusers.engine.checkpoints import Progress
from flowmo_diffusers.engine.ema import EMA
from flowmo_diffusers.engine.norms import NormRescaler
from flowmo_diffusers.engine.processes import on_any_process
from flowmo_diffusers.engine.sharding import local, norms


Losses = dict[str, torch.Tensor]


class TrainStep:
    """
    Forward, backward, update and everything that follows an update. A step whose loss or gradient is not finite on any
    process changes no weight and no moment: it is counted in `progress` and passed over, data and schedule go on.

    Args:
        accelerator: Has prepared model and optimiser.
        model: As prepared.
        optimizer: As prepared.
        lr_scheduler: Not prepared: it advances once a step, whatever the number of processes.
        progress: Counts the steps.
        ema: Of the model's parameters.
        norm_rescaler: Of the model's weights.
        max_grad_norm: Gradients are clipped to this norm over all parameters.
        max_skipped: Steps that may be passed over in a row.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        progress: Progress,
        ema: EMA,
        norm_rescaler: NormRescaler | None = None,
        max_grad_norm: float | None = None,
        max_skipped: int = 10,
    ):
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.progress = progress
        self.ema = ema
        self.norm_rescaler = norm_rescaler
        self.max_grad_norm = max_grad_norm
        self.max_skipped = max_skipped

    def __call__(self, batches: Sequence[Any], compute_losses: Callable[[Any], Losses]) -> Losses:
        """
        Args:
            batches: Those that are accumulated, as many as the accelerator was told, of equal size.
            compute_losses: A batch to scalars by name, "loss" to be minimised.

        Returns:
            Means over the batches of this process, and "gradient_norm" over all parameters and processes.

        Raises:
            FloatingPointError: After more than `max_skipped` skipped steps in a row, on every process.
        """
        losses = self._backward(batches, compute_losses)
        finite = self._update(losses)
        progress = self.progress
        progress.step += 1
        progress.skipped += not finite
        progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
        if progress.skipped_in_a_row > self.max_skipped:
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            raise FloatingPointError(
                f"{progress.skipped_in_a_row} steps in a row, the last of them step {progress.step}, had a loss or "
                f"gradient that is not finite: {values}"
            )
        return losses

    def _backward(self, batches: Sequence[Any], compute_losses: Callable[[Any], Losses]) -> Losses:
        # Not after the update: what is free at the end of a step a CPU's allocator gives back, and asks for again.
        self.optimizer.zero_grad()
        sums: Losses = {}
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    losses = compute_losses(batch)
                self.accelerator.backward(losses["loss"])
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / len(batches)
        return sums

    def _update(self, losses: Losses) -> bool:
        """Whether all was finite. On a GPU this is where the step waits for it."""
        finite = self._optimize(losses)
        self.lr_scheduler.step()
        if finite:
            if self.norm_rescaler is not None:
                self.norm_rescaler.step()
            self.ema.update(self.model.parameters(), self.progress.step)
        return finite

    def _optimize(self, losses: Losses) -> bool:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # It has clipped and stepped in the backward pass, or passed over the step.
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            losses["gradient_norm"] = torch.as_tensor(norm, device=losses["loss"].device)
            return not self.accelerator.optimizer_step_was_skipped
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.accelerator.unscale_gradients()
        norm = torch.linalg.vector_norm(torch.stack(norms(gradients)))
        losses["gradient_norm"] = norm
        not_finite = on_any_process(self.accelerator, ~(norm + losses["loss"]).isfinite())[0]
        if self.max_grad_norm is not None:
            torch._foreach_mul_(local(gradients), (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        if not not_finite:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # float16: what overflows lowers the scale
        return not not_finite

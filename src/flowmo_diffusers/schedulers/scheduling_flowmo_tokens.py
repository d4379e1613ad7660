"""How tokens are filled in: which groups of bits become known at which step, and how strongly a step is guided."""

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from flowmo_diffusers.engine.seeding import Generators, draw_uniform


MASK_SCHEDULES = ("arccos", "cosine", "linear")
GUIDANCE_SCHEDULES = ("constant", "linear", "cosine-power")


def mask_ratio(r: torch.Tensor, schedule: str) -> torch.Tensor:
    """
    The share of groups that is masked after a share r in [0, 1] of the way: 1 at r = 0, 0 at r = 1. "cosine" is
    cos(pi r / 2) (MaskGIT, arXiv 2202.04200), "arccos" arccos(r) / (pi / 2) (MaskBit), "linear" 1 - r.
    """
    if schedule == "cosine":
        return torch.cos(r * (math.pi / 2)).clamp(0, 1)
    if schedule == "arccos":
        return torch.arccos(r) / (math.pi / 2)
    if schedule == "linear":
        return 1 - r
    raise ValueError(f"mask_schedule={schedule!r} is unknown: it must be one of {MASK_SCHEDULES}")


@dataclass
class FlowMoTokenSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample: Indices (b, tokens, groups), fewer of them masked.
    """

    prev_sample: torch.Tensor


class FlowMoTokenScheduler(SchedulerMixin, ConfigMixin):
    """
    Fills in masked tokens in n steps (MaskGIT, arXiv 2202.04200). At each, every masked group is drawn from its
    distribution, and those of highest confidence stay: log p of what was drawn, plus Gumbel noise times
    `noise_temperature`. How many are still masked after step i is `mask_ratio((i + 1) / n)` of those at the beginning,
    rounded down, an image by itself. What is known never changes.

    Args:
        mask_schedule: "arccos", "cosine" or "linear"; see [`mask_ratio`].
        temperature: Of the distributions; 0 takes the likeliest value.
        noise_temperature: Weight of the Gumbel noise at the first step. 0 reveals the most confident groups, more
            makes their order more random.
        noise_decay: "linear": the noise falls by 1 - (i + 1) / n, to none at the last step. "constant": it does not.
        guidance_schedule: How guidance grows from 1 (none) to its scale w over the steps, with r = (i + 1) / n:
            "constant" is w throughout, "linear" 1 + (w - 1) r, "cosine-power" 1 + (w - 1) (1 - cos(pi r^p)) / 2.
        guidance_power: p.

    Raises:
        ValueError: If an argument is out of range.
    """

    _compatibles = []
    order = 1

    @register_to_config
    def __init__(
        self,
        mask_schedule: str = "arccos",
        temperature: float = 1.0,
        noise_temperature: float = 4.5,
        noise_decay: str = "linear",
        guidance_schedule: str = "cosine-power",
        guidance_power: float = 2.0,
    ):
        for name, value, known in (
            ("mask_schedule", mask_schedule, MASK_SCHEDULES),
            ("noise_decay", noise_decay, ("linear", "constant")),
            ("guidance_schedule", guidance_schedule, GUIDANCE_SCHEDULES),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: it must be one of {known}")
        for name, value in (("temperature", temperature), ("noise_temperature", noise_temperature)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a number of at least 0")
        if not 0 < guidance_power < math.inf:
            raise ValueError(f"guidance_power={guidance_power} must be a positive number")
        self.num_inference_steps: int | None = None
        self.timesteps: torch.Tensor | None = None
        self._step_index = 0
        self._masked_at_first: torch.Tensor | None = None

    def set_timesteps(self, num_inference_steps: int = 64, device: str | torch.device | None = None) -> None:
        """
        Begins a run of n steps: `timesteps` count down from n - 1 to 0.

        Raises:
            ValueError: If there is not at least one step.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)
        self._step_index = 0
        self._masked_at_first = None

    def guidance_weights(self, guidance_scale: float) -> list[float]:
        """w of each step; a scale of 1 is no guidance at any of them."""
        self._check_started()
        kind, power = self.config.guidance_schedule, self.config.guidance_power
        weights = []
        for i in range(self.num_inference_steps):
            r = (i + 1) / self.num_inference_steps
            grown = {"constant": 1.0, "linear": r, "cosine-power": (1 - math.cos(math.pi * r**power)) / 2}[kind]
            weights.append(1 + (guidance_scale - 1) * grown)
        return weights

    def sample(self, logits: torch.Tensor, generator: Generators = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws values by one uniform number each, against the cumulated distribution.

        Args:
            logits: (b, ..., values).
            generator: One, or one for each of the batch.

        Returns:
            The values (b, ...) int64, and their log p (b, ...) at the scheduler's temperature (1 if that is 0).
        """
        log_p = (logits.float() / (self.config.temperature or 1.0)).log_softmax(-1)
        if self.config.temperature == 0:
            values = log_p.argmax(-1)
        else:
            cumulated = log_p.exp().cumsum(-1)
            uniform = draw_uniform(logits.shape[:-1], generator, logits.device)[..., None]
            # The last sum is 1 but for rounding; `right` passes over values of probability 0.
            values = torch.searchsorted(cumulated, uniform * cumulated[..., -1:], right=True)
            values = values.clamp(max=logits.shape[-1] - 1).squeeze(-1)
        return values, log_p.gather(-1, values[..., None]).squeeze(-1)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> FlowMoTokenSchedulerOutput | tuple[torch.Tensor]:
        """
        Args:
            model_output: Logits (b, tokens, groups, values).
            timestep: The entry of `timesteps`; steps follow each other whatever it says.
            sample: Indices (b, tokens, groups), -1 where masked.
            generator: One, or one for each image, which makes a batch equal to its images one by one.

        Raises:
            ValueError: If `set_timesteps` was not called, all steps are done, or shapes do not fit.
        """
        self._check_started()
        if self._step_index >= self.num_inference_steps:
            raise ValueError("the last step is done: call `set_timesteps` before sampling again")
        if model_output.shape[:-1] != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}, sample {tuple(sample.shape)}: expected "
                "(b, tokens, groups, values) and (b, tokens, groups)"
            )
        masked = sample < 0
        if self._masked_at_first is None:
            self._masked_at_first = masked.flatten(1).sum(1)
        r = (self._step_index + 1) / self.num_inference_steps
        ratio = mask_ratio(torch.tensor(r, dtype=torch.float64), self.config.mask_schedule).item() if r < 1 else 0.0
        still_masked = torch.floor(self._masked_at_first * ratio).long()

        values, log_p = self.sample(model_output, generator)
        noise_temperature = self.config.noise_temperature * (1 - r if self.config.noise_decay == "linear" else 1)
        uniform = draw_uniform(sample.shape, generator, sample.device)
        gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(uniform.dtype).tiny)))
        confidence = torch.where(masked, log_p + noise_temperature * gumbel, torch.inf)

        # Rank 0 is the least confident: so many of them stay masked.
        rank = confidence.flatten(1).argsort(dim=1, stable=True).argsort(dim=1).reshape(sample.shape)
        revealed = masked & (rank >= still_masked[:, None, None])
        self._step_index += 1
        prev_sample = torch.where(revealed, values, sample)
        return FlowMoTokenSchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _check_started(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is not set: call `set_timesteps` first")

"""The power-shifted flow schedule of FlowMo (paper section 3.4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput


@dataclass
class FlowMoSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample: x at the next time (b, c, h, w), in the dtype of the given sample.
    """

    prev_sample: torch.Tensor


SOLVERS = ("euler", "heun")


def check_guidance_interval(interval: Sequence[float]) -> None:
    """Raises `ValueError` if these are not two noise levels, the lower one first."""
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1]:
        raise ValueError(f"guidance_interval={interval} must be two noise levels, the lower one first")


class FlowMoScheduler(SchedulerMixin, ConfigMixin):
    """
    A rectified flow integrated on t_i = ((n - i) / n)^rho, i = 0 ... n: large steps at high noise.

    The model's time t runs from 1 (noise) to 0 (image); `timesteps` are `num_train_timesteps * t`. All arithmetic is
    float32 whatever the model's dtype.

    Args:
        num_train_timesteps: Scale of `timesteps`.
        rho: Power of the schedule; 1 is an even grid, the paper's value is 4.
        solver: "euler", or "heun", which asks the model twice a step but for the last.
        num_inference_steps: n where a call names none, for which the model was made.
        guidance_scale: As `num_inference_steps`; see [`FlowMoPipeline`] for this and the next.
        guidance_interval: EDM noise levels, the lower one first.

    Raises:
        ValueError: If an argument is out of range.
    """

    _compatibles = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        rho: float = 4.0,
        solver: str = "euler",
        num_inference_steps: int = 25,
        guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.17, 1.02),
    ):
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r} is unknown: it must be one of {', '.join(map(repr, SOLVERS))}")
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps={num_train_timesteps} must be at least 1; the usual value is 1000")
        if not rho > 0:
            raise ValueError(f"rho={rho} must be positive; the paper's value is 4.0")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1; the paper's value is 25")
        check_guidance_interval(guidance_interval)
        self.register_to_config(guidance_interval=list(guidance_interval))  # as it comes back from JSON
        self.order = 2 if solver == "heun" else 1  # times that the model is asked in a step
        self.num_inference_steps = None
        self.times = None
        self.timesteps = torch.linspace(num_train_timesteps, 0, num_train_timesteps)
        self._step_index = None
        self._begin_index = None
        self._heun_start: tuple | None = None

    @property
    def step_index(self) -> int | None:
        """Position in `timesteps` of the next [`~FlowMoScheduler.step`], `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position in `timesteps` where sampling begins, if it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sampling begins there instead of at the position of the first `timestep` given to `step`."""
        self._begin_index = begin_index

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that sampling begins with."""
        return 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """The model takes x_t as it is."""
        return sample

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """
        Lays the grid and forgets the previous run: `times` holds t_0 ... t_n, `timesteps` the times at which the
        model is asked, scaled by `num_train_timesteps`: n, and 2n - 1 for Heun.

        Args:
            num_inference_steps: n. Default: the configuration's.
            device: Of `timesteps`; `times` stay on the CPU.

        Raises:
            ValueError: If there is not at least one step.
        """
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
        self.num_inference_steps = num_inference_steps
        grid = torch.arange(num_inference_steps, -1, -1, dtype=torch.float32) / num_inference_steps
        # Kept on the CPU: steps read single times, which must not wait for the device.
        self.times = grid**self.config.rho
        asked = self.times[:-1]
        if self.order == 2:
            asked = torch.cat([asked[:1], asked[1:].repeat_interleave(2)])
        self.timesteps = (asked * self.config.num_train_timesteps).to(device)
        self._step_index = None
        self._begin_index = None
        self._heun_start = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> FlowMoSchedulerOutput | tuple[torch.Tensor]:
        """
        One step from `timestep` towards the image: x - (t_i - t_{i+1}) v.

        Args:
            model_output: The velocity v at `sample` (b, c, h, w).
            timestep: The entry of `timesteps` at which the model was asked. Only the first call reads it.
            sample: x at that time (b, c, h, w).
            return_dict: Whether to return a [`FlowMoSchedulerOutput`] or a tuple of one.

        Raises:
            ValueError: If `set_timesteps` was not called, if sampling begins at a time that is not one of
                `timesteps`, or if it has already reached the image.
        """
        if self.times is None:
            raise ValueError("num_inference_steps is not set: call `set_timesteps` before `step`")
        if self._step_index is None:
            self._step_index = self._begin_index if self._begin_index is not None else self._index_for(timestep)
        if self._step_index >= len(self.timesteps):
            raise ValueError("the last step is done: call `set_timesteps` before sampling again")
        v, x = model_output.float(), sample.float()
        x_next = self._euler_step(v, x) if self.order == 1 else self._heun_step(v, x)
        self._step_index += 1
        x_next = x_next.to(sample.dtype)
        return FlowMoSchedulerOutput(x_next) if return_dict else (x_next,)

    def _step_size(self, i: int) -> float:
        return (self.times[i] - self.times[i + 1]).item()

    def _euler_step(self, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - self._step_size(self._step_index) * v

    def _heun_step(self, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Euler to the next time, then again from the start with the mean of both velocities (Heun's method)."""
        i = (self._step_index + 1) // 2
        if self._heun_start is None:
            dt = self._step_size(i)
            if i + 1 < self.num_inference_steps:
                self._heun_start = (x, v, dt)
            return x - dt * v
        start, v_start, dt = self._heun_start
        self._heun_start = None
        return start - dt * (v_start + v) / 2

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        x_t = t z + (1 - t) x in float32, returned in the sample's dtype.

        Args:
            original_samples: x (b, c, h, w).
            noise: z (b, c, h, w).
            timesteps: Continuous, in [0, num_train_timesteps], shape (b,) or ().
        """
        t = (timesteps.to(original_samples.device, torch.float32) / self.config.num_train_timesteps).reshape(-1)
        t = t.reshape(-1, *[1] * (original_samples.ndim - 1))
        return (t * noise.float() + (1 - t) * original_samples.float()).to(original_samples.dtype)

    def _index_for(self, timestep: torch.Tensor | float) -> int:
        """Of a time asked twice, the later entry: it is the one a step begins with."""
        matches = (self.timesteps.cpu() == float(timestep)).nonzero()
        if len(matches) == 0:
            raise ValueError(f"timestep={timestep} is not on the grid: it must be an entry of `timesteps`")
        return int(matches[-1])

    def __len__(self) -> int:
        return self.config.num_train_timesteps

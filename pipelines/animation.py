"""The way from noise to an image, as an animated picture."""

from pathlib import Path
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid

from flowmo_diffusers.engine.files import atomic_file


FORMATS = {".gif": {}, ".png": {}, ".webp": {"lossless": True}}


class Trajectory:
    """
    A `callback_on_step_end` of [`FlowMoPipeline`] that keeps x_t after every step, of the last call it was given to.

    Args:
        noise: The `latents` that the pipeline is given too (b, c, h, w): x_t at t = 1, which no callback sees. Without
            it the trajectory begins after the first step.

    Example:
        ```py
        >>> trajectory = Trajectory()
        >>> pipe(image, callback_on_step_end=trajectory)
        >>> trajectory.save("reconstruction.webp", scale=8)
        ```
    """

    def __init__(self, noise: torch.Tensor | None = None):
        self.noise = noise
        self.times: list[float] = []
        self.samples: list[torch.Tensor] = []

    def __call__(
        self, pipe: DiffusionPipeline, i: int, timestep: torch.Tensor, kwargs: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """
        Keeps `kwargs["latents"]`, which is returned as it is.

        Raises:
            ValueError: If they are the tokens of a [`FlowMoGenerationPipeline`] and no x_t.
        """
        x_t = kwargs["latents"]
        if not x_t.is_floating_point():
            raise ValueError("a Trajectory is a callback of FlowMoPipeline: these latents are tokens, not images")
        times, order = pipe.scheduler.times.tolist(), pipe.scheduler.order
        if i == 0:
            self.times, self.samples = [], []
            if self.noise is not None:
                self._keep(times[0], self.noise)
        # Heun's method asks twice a step, but for the last one; only then is x_t on the trajectory.
        if (i + 1) % order == 0 or i + 1 == pipe.num_timesteps:
            self._keep(times[-(-(i + 1) // order)], x_t)
        return kwargs

    def estimates(self) -> list[torch.Tensor]:
        """
        For each x_t the image that the model saw in it, x_0 = x_t - t v, (b, c, h, w) float32. v is the velocity of
        the step that follows, guided where that was: the difference of two x_t over that of their times.
        """
        states = list(zip(self.times, self.samples, strict=True))
        steps = zip(states[:-1], states[1:], strict=True)
        return [x - t * (x - x_next) / (t - t_next) for (t, x), (t_next, x_next) in steps] + self.samples[-1:]

    def frames(self, scale: int = 1) -> list[PIL.Image.Image]:
        """
        A picture of each x_t, the images of a batch side by side, and below each of them its estimate.

        Args:
            scale: Whole factor by which they are enlarged, without smoothing.

        Raises:
            ValueError: If there is no x_t yet.
        """
        if not self.samples:
            raise ValueError("this Trajectory is empty: give it to a pipeline as callback_on_step_end first")
        return [
            _enlarge(make_image_grid(_pictures(x_t) + _pictures(x_0), rows=2, cols=len(x_t)), scale)
            for x_t, x_0 in zip(self.samples, self.estimates(), strict=True)
        ]

    def save(self, path: str | Path, scale: int = 1, milliseconds: int = 100, hold: int = 2000) -> None:
        """
        The [`~Trajectory.frames`] as an animated picture that runs in a loop.

        Args:
            path: Of a `.webp`, `.png` or `.gif` file.
            scale: See [`~Trajectory.frames`].
            milliseconds: That a frame is shown.
            hold: The same of the last one.

        Raises:
            ValueError: If the file is to have another format, or there is no x_t yet.
        """
        path = Path(path)
        if path.suffix.lower() not in FORMATS:
            raise ValueError(f"path {str(path)!r} must end in one of {', '.join(FORMATS)}")
        first, *others = self.frames(scale)
        options: dict[str, Any] = FORMATS[path.suffix.lower()]
        durations = [milliseconds] * len(others) + [hold]
        with atomic_file(path) as temporary:
            first.save(temporary, save_all=True, append_images=others, duration=durations, loop=0, **options)

    def _keep(self, t: float, x_t: torch.Tensor) -> None:
        self.times.append(t)
        self.samples.append(x_t.float().cpu())


def _pictures(images: torch.Tensor) -> list[PIL.Image.Image]:
    """(b, c, h, w), of which what lies outside [-1, 1] is clipped."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy((images / 2 + 0.5).clamp(0, 1)))


def _enlarge(picture: PIL.Image.Image, scale: int) -> PIL.Image.Image:
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, PIL.Image.Resampling.NEAREST)

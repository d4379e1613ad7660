"""What all pipelines of this library share: how they are saved, loaded, watched, and what they refuse."""

import os
from collections.abc import Callable, Sequence

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging

from flowmo_diffusers.engine.seeding import Generators
from flowmo_diffusers.models.loading import OwnCheckpointsOnly


logger = logging.get_logger(__name__)


Callback = Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class SafePipeline(OwnCheckpointsOnly, DiffusionPipeline):
    """Base of the pipelines: weights come from safetensors and go to safetensors, and steps can be watched."""

    _callback_tensor_inputs = ["latents"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "SafePipeline":
        """
        As [`DiffusionPipeline.from_pretrained`], but never from pickled weights, which run code when they are read.

        Raises:
            ValueError: If it is the checkpoint of another pipeline, or its weights are missing or of other shapes.
            OSError: If there is no pipeline, or no safetensors weights.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False is refused: weights are read from safetensors only")
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    def save_pretrained(self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs) -> None:
        """As [`DiffusionPipeline.save_pretrained`], but always to safetensors."""
        if not safe_serialization:
            logger.warning("safe_serialization=False is ignored: FlowMo's weights are written to safetensors only")
        super().save_pretrained(save_directory, **kwargs)

    @property
    def guidance_scale(self) -> float:
        """w of the running or last call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """How often the running or last call asks the callback: once an answer of the model, or step of tokens."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the sampling by `pipe._interrupt = True`; what there is is then returned."""
        return self._interrupt

    def _check_callback(self, tensor_inputs: Sequence[str]) -> None:
        if unknown := set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; known are {self._callback_tensor_inputs}"
            )

    def _call_back(
        self,
        callback: Callback | None,
        tensor_inputs: Sequence[str],
        i: int,
        timestep: torch.Tensor,
        latents: torch.Tensor,
    ) -> torch.Tensor:
        """The latents, or what the callback puts in their place."""
        if callback is None:
            return latents
        available = {"latents": latents}
        given = {name: available[name] for name in tensor_inputs}
        return callback(self, i, timestep, given).pop("latents", latents)


def check_generator(generator: Generators, batch: int) -> None:
    """Raises `ValueError` if it is a list of another length than the batch."""
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"generator is a list of {len(generator)}; expected one for each of {batch} images")

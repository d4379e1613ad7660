"""LoRA adapters on this library's models."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import is_peft_available


class AdapterMixin(PeftAdapterMixin):
    """
    diffusers' [`PeftAdapterMixin`], to stand before `ModelMixin`: `add_adapter`, `save_lora_adapter`,
    `load_lora_adapter`, `set_adapters`, `fuse_lora`, `unload_lora` and the rest. Its methods need PEFT
    (`pip install "flowmo_diffusers[lora]"`).

    A class names in `lora_target_modules` what is worth adapting: a regular expression, as `peft.LoraConfig` takes it.
    """

    lora_target_modules: str

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """As `PeftAdapterMixin.add_adapter`, of a `peft.LoraConfig`. Raises `ImportError` if PEFT is not installed."""
        _check_peft()
        super().add_adapter(adapter_config, adapter_name)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        prefix: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ) -> None:
        """
        As `PeftAdapterMixin.load_lora_adapter`, but from safetensors only, and by default of what
        `save_lora_adapter` writes, which has no prefix.

        Raises:
            ValueError: If pickled weights are asked for, or the name is taken.
            OSError: If there is no adapter.
            ImportError: If PEFT is not installed.
        """
        _check_peft()
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False is refused: weights are read from safetensors only")
        kwargs["use_safetensors"] = True
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, prefix=prefix, hotswap=hotswap, **kwargs)

    @functools.wraps(ModelMixin.save_pretrained)  # of whose signature pipelines read what it takes
    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """
        As `ModelMixin.save_pretrained`.

        Raises:
            ValueError: If adapters are attached, with which the names of the weights are others.
        """
        if attached := sorted(getattr(self, "peft_config", {})):
            raise ValueError(
                f"the adapters {attached} are attached: save them by `save_lora_adapter`, and the weights after "
                "`unload_lora()`, or, with the adapters in them, after `fuse_lora()` and `unload_lora()`"
            )
        super().save_pretrained(save_directory, *args, **kwargs)


def _check_peft() -> None:
    if not is_peft_available():
        raise ImportError('LoRA needs PEFT: pip install "flowmo_diffusers[lora]"')

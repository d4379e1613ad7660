"""What this library's models and pipelines refuse to load, and what they keep to themselves."""

import json
import os
import threading
from typing import Any


# While diffusers loads a model, new parameters have no memory and another dtype, in every thread of the process. It
# sets back what it found before, so that two loads that overlap would leave it so for good.
_one_at_a_time = threading.RLock()


class OwnCheckpointsOnly:
    """
    A mixin, to stand before diffusers' `ConfigMixin`: refuses the configuration of another class, of which diffusers
    would take whatever has a known name.
    """

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        """Raises `ValueError` if the configuration names another class."""
        name = config_dict.get("_class_name", cls.__name__)
        name = name if isinstance(name, str) else name[-1]  # [file, class] where a checkpoint carries its code
        if name not in (base.__name__ for base in cls.__mro__):
            raise ValueError(f"this is the checkpoint of a {name}, not of a {cls.__name__}")
        return super().extract_init_dict(config_dict, **kwargs)

    def to_json_string(self) -> str:
        """
        As diffusers has it, without where this was loaded from: in a file that may be published, a path says something
        of a machine and nothing of a model.
        """
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class WholeCheckpointsOnly(OwnCheckpointsOnly):
    """A mixin for models, to stand before diffusers' `ModelMixin`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        As `ModelMixin.from_pretrained`, but from safetensors only (pickled weights run code when they are read),
        whole or not at all, and from one thread at a time.

        Raises:
            ValueError: If it is the checkpoint of another model, or weights are missing, unknown or of other shapes.
            OSError: If there is no model, or no safetensors weights.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False is refused: weights are read from safetensors only")
        with_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        with _one_at_a_time:
            model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        problems = {kind.removesuffix("_keys"): keys for kind, keys in info.items() if keys}
        if problems:
            raise ValueError(f"{pretrained_model_name_or_path} is not a checkpoint of this model: weights {problems}")
        return (model, info) if with_info else model

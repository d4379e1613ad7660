"""What this library's models and pipelines refuse to load."""

from typing import Any


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

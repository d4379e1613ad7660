"""Pipelines of this library or of diffusers, whichever a folder holds."""

import os

from diffusers import DiffusionPipeline

import flowmo_diffusers


def load_pipeline(pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> DiffusionPipeline:
    """
    As [`DiffusionPipeline.from_pretrained`], which knows the pipelines of diffusers alone, for this library's as well.

    Raises:
        OSError: If there is no pipeline.
        ValueError: As the pipeline's own `from_pretrained`.
    """
    # Diffusers looks for the class of a pipeline among its own names alone, whatever libraries it has been told of for
    # components; the only way in would be to set ours as attributes of the module `diffusers`.
    name = DiffusionPipeline.load_config(pretrained_model_name_or_path)["_class_name"]
    ours = isinstance(name, str) and name in flowmo_diffusers.__all__
    pipeline_class = getattr(flowmo_diffusers, name) if ours else DiffusionPipeline
    return pipeline_class.from_pretrained(pretrained_model_name_or_path, **kwargs)

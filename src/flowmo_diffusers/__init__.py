"""FlowMo, the transformer diffusion autoencoder for image tokenization, in the manner of diffusers."""

import importlib


__version__ = "0.1.0"

_EXPORTS = {
    "FlowMoAutoencoder": "flowmo_diffusers.models.autoencoder_flowmo",
    "FlowMoScheduler": "flowmo_diffusers.schedulers.scheduling_flowmo",
    "FlowMoPipeline": "flowmo_diffusers.pipelines.pipeline_flowmo",
    "FlowMoTokenGenerator": "flowmo_diffusers.models.token_generator",
    "FlowMoTokenScheduler": "flowmo_diffusers.schedulers.scheduling_flowmo_tokens",
    "FlowMoGenerationPipeline": "flowmo_diffusers.pipelines.pipeline_generation",
    "starter": "flowmo_diffusers.assets",
    "starter_generator": "flowmo_diffusers.assets",
    # diffusers looks for these two on the library that a pipeline's model_index.json names.
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}

__all__ = [
    "FlowMoAutoencoder",
    "FlowMoGenerationPipeline",
    "FlowMoPipeline",
    "FlowMoScheduler",
    "FlowMoTokenGenerator",
    "FlowMoTokenScheduler",
    "__version__",
    "starter",
    "starter_generator",
]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})

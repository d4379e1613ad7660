"""Makes diffusers treat this package as a library of components, as it treats transformers."""

from diffusers.pipelines import pipeline_loading_utils


def register_library() -> None:
    """
    Saved pipelines then name their parts `["flowmo_diffusers", "FlowMoAutoencoder"]` instead of a deep module path,
    so that files may move between modules without breaking checkpoints. The table is semi-private in diffusers; a
    test pins the behaviour.
    """
    methods = ["save_pretrained", "from_pretrained"]
    pipeline_loading_utils.LOADABLE_CLASSES["flowmo_diffusers"] = {"ModelMixin": methods, "SchedulerMixin": methods}

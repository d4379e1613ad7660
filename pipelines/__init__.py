"""Pipelines: images or labels in, images out."""

from flowmo_diffusers.pipelines.registration import register_library


register_library()

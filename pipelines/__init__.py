"""Pipelines: images or labels in, images out."""

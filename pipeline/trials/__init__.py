"""Trials: plan them, run one without Ray, evaluate it, write its checkpoints."""

"""Benchmarks of `farebox bench`: one module each, the harness, and the baselines of the papers' code (reference)."""

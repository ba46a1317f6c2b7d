"""What replicas need of a Ray cluster: how many there are, their GPUs, and the wait until those are free."""

from __future__ import annotations

import time
from collections.abc import Mapping

import ray

from pipeline.console import Echo
from pipeline.errors import ConfigError

START_TIMEOUT_S = 600.0
"""How long replicas may take to load their model, and the cluster to free the resources that they need."""
WAIT_LOG_INTERVAL_S = 10.0
"""Seconds between two lines about waiting."""


def wait_for_resources(needed: Mapping[str, float], echo: Echo, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until the cluster has the free resources that the run needs.

    Without it, Ray would queue the actors, and Tune its trials, forever and without a message.

    Raises:
        ConfigError: they are not free within `timeout_s` seconds.
    """
    deadline, next_line = time.monotonic() + timeout_s, 0.0
    while missing := _missing_resources(needed):
        resources = " and ".join(f"{n:g} {kind}" for kind, n in missing.items())
        present = ", ".join(f"{kind} {ray.cluster_resources().get(kind, 0):g}" for kind in needed)
        if time.monotonic() > deadline:
            raise ConfigError(
                f"waited {timeout_s:.0f} s for {resources} in use by other jobs (the cluster has {present}): end those "
                "jobs, add a node (its autoscaler was not asked; replica_gpus=1 asks it for GPUs), or set fewer "
                "replicas=N"
            )
        if time.monotonic() > next_line:
            next_line = time.monotonic() + WAIT_LOG_INTERVAL_S
            echo(f"waiting for {resources} in use by other jobs of this cluster (it has {present})")
        time.sleep(0.5)


def _missing_resources(needed: Mapping[str, float]) -> dict[str, float]:
    free = ray.available_resources()
    return {kind: n for kind, n in needed.items() if free.get(kind, 0) + 1e-3 < n}


def replica_resources(
    replicas: int | str, resources: Mapping[str, float], threads: int, replica_gpus: float | str = "auto"
) -> tuple[int, float]:
    """Return the number of replicas and the GPUs of each.

    With "auto" for both, there is one for each GPU, or for each `threads` cores. If only the number is "auto", as many
    as the GPUs have room for, and at least one.
    """
    gpus = int(resources.get("GPU", 0))
    if replica_gpus == "auto":
        count = (gpus or max(1, int(resources["CPU"]) // threads)) if replicas == "auto" else replicas
        return int(count), gpu_share(gpus, int(count))
    share = float(replica_gpus)
    return int(max(1, gpus * int(1 / share + 1e-3)) if replicas == "auto" else replicas), share


def gpu_share(gpus: int, replicas: int) -> float:
    """Return the fraction of a GPU for each replica, such that all can be placed: a fraction cannot span two GPUs."""
    if not gpus:
        return 0
    per_gpu = -(-replicas // gpus)
    return 1 if per_gpu == 1 else int(10_000 / per_gpu) / 10_000  # Ray counts in units of 1/10,000

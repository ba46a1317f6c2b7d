"""A sweep on a Ray cluster that is reached over SSH: `make test-cluster`."""

from __future__ import annotations

import pytest

from tests.cluster import loopback

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not loopback.possible(), reason="needs root, Debian's openssh-server and rsync"),
]


def test_a_submitted_sweep_continues_after_its_driver_was_killed() -> None:
    loopback.run()

"""Fixtures of the tests of methods."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Results are stated for one thread, and some tests change the number."""
    torch.set_num_threads(1)

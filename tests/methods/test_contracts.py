"""Every registered method passes the contract of its capabilities."""

from methods import all_methods
from methods.testing import contract

globals().update({f"Test_{name}": contract(name) for name in all_methods()})


class Test_bar(contract("bar")):  # type: ignore[misc]
    """It starts from smaller images than zero-shot: test_pixel_methods.py tests that it learns from there."""

    test_learns_the_toy_task = None

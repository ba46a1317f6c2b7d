"""Every registered method passes the contract of its capabilities."""

from methods import all_methods
from methods.testing import contract

globals().update({f"Test_{name}": contract(name) for name in all_methods()})

"""Every registered method passes the contract by registration alone."""

import pytest

from methods import all_methods
from methods.testing import MethodContract


class TestContracts(MethodContract):
    @pytest.fixture(params=sorted(all_methods()))
    def name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

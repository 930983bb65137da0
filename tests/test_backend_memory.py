"""The memory backend, and the tests' own, keep the contract of the real ones."""

from __future__ import annotations

import pytest
from backend_contract import BackendContract
from fakes import FakeBackend

import wggw


class TestMemoryBackend(BackendContract):
    @pytest.fixture(params=[wggw.MemoryBackend, FakeBackend])
    def backend(self, request: pytest.FixtureRequest) -> wggw.Backend:
        backend: wggw.Backend = request.param()
        backend.setup()
        return backend

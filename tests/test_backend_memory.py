"""The memory backend, and the tests' own, keep the contract of the real ones."""

from __future__ import annotations

import pytest
from backend_contract import BackendContract, WireGuardContract
from fakes import FakeBackend

import wggw


class TestMemoryBackend(BackendContract):
    @pytest.fixture
    def backend(self) -> wggw.Backend:
        return wggw.MemoryBackend()


class TestFakeBackend(WireGuardContract):
    @pytest.fixture
    def backend(self) -> wggw.Backend:
        backend = FakeBackend()
        backend.setup()
        return backend

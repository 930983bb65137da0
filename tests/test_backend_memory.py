"""The memory backend keeps the contract of the real ones."""

from __future__ import annotations

import pytest
from backend_contract import BackendContract

import wggw


class TestMemoryBackend(BackendContract):
    @pytest.fixture
    def backend(self) -> wggw.Backend:
        backend = wggw.MemoryBackend()
        backend.setup()
        return backend

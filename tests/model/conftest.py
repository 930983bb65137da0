"""The shared modules of this directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest

pytest.register_assert_rewrite("laws")

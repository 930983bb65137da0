"""The laws: black-box tests that hold for any design. See rig.py and faults.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

"""The laws: black-box tests that hold for any design. See rig.py and faults.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "real")]

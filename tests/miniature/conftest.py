"""Makes the scripts of `runs/reference/miniature` importable by their bare names, as they import each other."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "runs" / "reference" / "miniature"))

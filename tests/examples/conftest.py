"""The examples are scripts beside the package: their folder goes onto the path, as when one of them is started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

"""The demo model that ships with the farm: coloured shapes on coloured backgrounds."""

from pathlib import Path

SHAPES_DIR = Path(__file__).parent / "shapes"

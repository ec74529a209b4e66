"""Timing scripts; tests never import them."""

import sys
from pathlib import Path

# Planted truths are imported under the name that they have in tests, `truths`.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

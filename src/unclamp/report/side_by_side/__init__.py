"""Recorded runs that no study made, side by side: as plain data, then in a terminal or on a page.

Runs are grouped into arms, arms are compared with one of them, and every figure comes with how it
was found and what it cannot say. Torch-free.
"""

from unclamp.report.side_by_side.comparison import Comparison, compare_runs
from unclamp.report.side_by_side.reading import runs_to_compare

__all__ = ["Comparison", "compare_runs", "runs_to_compare"]

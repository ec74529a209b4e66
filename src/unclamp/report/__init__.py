"""A run or a study as something to read: plain data first, then a page, a table or JSON."""

from unclamp.report.view import View, build_view

__all__ = ["View", "build_view"]

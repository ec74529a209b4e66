"""The version of unclamp, in one place."""

__version__ = "0.1.0"

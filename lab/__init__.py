"""Scripts of the dated experiments in LOG.md."""

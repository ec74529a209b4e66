"""A run's numbers in Weights & Biases, in a run of its own or in the one that is already open."""

from collections.abc import Mapping, Sequence
from typing import Any

from unclamp.runlog import Header, Status
from unclamp.telemetry.sinks.backend import Backend
from unclamp.telemetry.sinks.numbers import Histogram

EXIT_CODES: Mapping[Status, int] = {"finished": 0, "failed": 1, "interrupted": 130}
"""What wandb makes a run's state of; 130 is what a shell gives after Ctrl-C."""


class WandB(Backend):
    """Log to wandb; the header goes to the run's config, under `unclamp`.

    A run that is open already (`wandb.run`) is used and left open. Otherwise `init` goes to
    `wandb.init`; wandb's own lines on the terminal and its copy of the terminal are off, unless
    `settings` says otherwise.

    Args:
        sites: Globs of modules whose sites get their own series and exponent histograms.
        prefix: Before every name that does not begin with it, such as "fp8/".
        **init: Arguments of `wandb.init`, such as project, name, mode="offline" and dir.

    Raises:
        UnsupportedError: The package wandb is not installed.
    """

    package = "wandb"

    def __init__(self, *, sites: str | Sequence[str] = (), prefix: str = "", **init: Any) -> None:
        super().__init__(sites=sites, prefix=prefix)
        quiet = {"silent": True, "console": "off"}
        self._init = {**init, "settings": init.get("settings", quiet)}

    def close(self, status: Status) -> None:
        """Finish the run, waiting for its upload; a run that was open before stays open."""
        if self._is_own:
            self._run.finish(exit_code=EXIT_CODES.get(status, 1))

    def _open(self, header: Header) -> None:
        import wandb  # noqa: PLC0415  # an extra, and slow to import

        self._is_own = wandb.run is None
        self._run = wandb.run or wandb.init(**self._init)
        self._histogram = wandb.Histogram
        self._run.config.update({"unclamp": header.to_dict()}, allow_val_change=True)

    def _write(
        self, step: int, numbers: Mapping[str, float], found: Mapping[str, Histogram]
    ) -> None:
        drawn = {
            name: self._histogram(np_histogram=(each.counts, each.edges))
            for name, each in found.items()
        }
        # wandb drops rows of a step before its current one. The caller of an open run may be
        # ahead of this thread: its current row takes our numbers then, and none of its is lost.
        self._run.log({**numbers, **drawn}, step=max(step, self._run.step))

"""A run's numbers in TensorBoard: scalars, exponent histograms of chosen sites, events as text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unclamp.runlog import Header, Status
from unclamp.telemetry.sinks.backend import Backend
from unclamp.telemetry.sinks.numbers import Histogram

FLUSH_S = 2
"""At most so many seconds of a killed run are missing, as in the run log."""


class TensorBoard(Backend):
    """Write event files that `tensorboard --logdir` shows.

    Args:
        folder: Where; a folder a run, as TensorBoard has it.
        sites: Globs of modules whose sites get their own series and exponent histograms.
        prefix: Before every tag that does not begin with it: "fp8/" where the trainer's own
            logger has a `loss` too.

    Raises:
        UnsupportedError: The package tensorboard is not installed.
    """

    package = "tensorboard"

    def __init__(
        self, folder: str | Path, *, sites: str | Sequence[str] = (), prefix: str = ""
    ) -> None:
        super().__init__(sites=sites, prefix=prefix)
        self._folder = str(folder)

    def event(self, step: int, kind: str, data: Mapping[str, Any]) -> None:
        """Mark the step, and write the event's data as text."""
        super().event(step, kind, data)
        self._text(f"unclamp/events/{kind}", json.dumps(data), step)

    def close(self, status: Status) -> None:
        """Write the status and what is left, and close the file."""
        self._text("unclamp/status", status, 0)
        self._writer.close()

    def _open(self, header: Header) -> None:
        # An extra, and slow to import. One summary a step: add_scalar per number takes 12 times
        # the time, which the training would feel through the interpreter's lock.
        from tensorboard.compat.proto import summary_pb2  # noqa: PLC0415
        from torch.utils.tensorboard import FileWriter  # noqa: PLC0415
        from torch.utils.tensorboard.summary import text  # noqa: PLC0415

        messages: Any = summary_pb2  # made at import: no checker sees its classes
        self._summary, self._histogram = messages.Summary, messages.HistogramProto
        self._as_text = text
        self._writer = FileWriter(self._folder, flush_secs=FLUSH_S)
        self._text("unclamp/header", json.dumps(header.to_dict(), indent=2), 0)

    def _write(
        self, step: int, numbers: Mapping[str, float], found: Mapping[str, Histogram]
    ) -> None:
        value = self._summary.Value
        scalars = [value(tag=name, simple_value=number) for name, number in numbers.items()]
        drawn = [value(tag=name, histo=self._drawn(each)) for name, each in found.items()]
        self._writer.add_summary(self._summary(value=scalars + drawn), step)

    def _drawn(self, found: Histogram) -> Any:
        middles = (found.edges[:-1] + found.edges[1:]) / 2
        return self._histogram(
            min=found.edges[0],
            max=found.edges[-1],
            num=found.counts.sum(),
            sum=np.dot(middles, found.counts),
            sum_squares=np.dot(middles**2, found.counts),
            bucket_limit=found.edges[1:].tolist(),
            bucket=found.counts.tolist(),
        )

    def _text(self, name: str, content: str, step: int) -> None:
        self._writer.add_summary(self._as_text(self._name(name), f"```\n{content}\n```"), step)

"""A logger for nvdlfw-inspect that writes a run log, with all digits.

    import nvdlfw_inspect.api as debug_api
    from unclamp.integrations.nvdlfw import UnclampLogger

    logger = UnclampLogger("runs/debug")
    debug_api.initialize(config_file=..., feature_dirs=[...], statistics_logger=logger)
    ...
    logger.step(iteration, loss=loss)  # beside debug_api.step()

Its files are read by `unclamp import nvdlfw`.
"""

import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from unclamp.errors import UnsupportedError
from unclamp.integrations.nvdlfw_rows import Formats, Rows, free_ids
from unclamp.runlog import Columns, Header, RunLogWriter, Status
from unclamp.telemetry.columns import Number, step_columns
from unclamp.telemetry.given import checked
from unclamp.telemetry.rank import find_place
from unclamp.version import __version__

try:
    from nvdlfw_inspect.logging import BaseLogger
except ImportError as error:
    raise UnsupportedError(
        "unclamp.integrations.nvdlfw needs nvdlfw-inspect, which is not installed: "
        'pip install "unclamp[nvdlfw]"; its log files are read without it, by `unclamp import '
        "nvdlfw`"
    ) from error

__all__ = ["UnclampLogger"]

LATE = 2
"""An iteration is written once a number of so many iterations later has come."""
NOT_COUNTED = (
    "Recorded by nvdlfw-inspect, which tells the amax and the scale of a tensor and no number of "
    "elements: how many elements were clamped is not known. Its other statistics are scalars of "
    "the steps."
)


class UnclampLogger(BaseLogger):
    """Write the statistics that nvdlfw-inspect logs into a run's folder.

    Each rank makes one with the same path. Call `step` for the losses, and `close` at the end, or
    use it as a context manager.

    Args:
        run: The run's folder, as for `unclamp.Recorder`.
        formats: "hybrid" for E5M2 gradients, "e4m3" for E4M3 throughout; no statistic tells.
        metadata: Free JSON data for the header.
        overwrite: Replace a run that is in the folder.

    Raises:
        RunLogError: The folder holds a run or something else.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        formats: Formats = "hybrid",
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        place = find_place()
        header = Header(
            unclamp_version=__version__,
            world_size=place.world_size,
            run_id=place.run_id,
            metadata={"framework": "nvdlfw-inspect", **(metadata or {})},
            counts="casts",
            notes=[NOT_COUNTED],
        )
        self._writer = RunLogWriter(run, header=header, rank=place.rank, overwrite=overwrite)
        self._rows = Rows(free_ids(place.rank, place.world_size), formats=formats)
        self._waiting: dict[int, dict[str, Number]] = {}
        self._losses: dict[int, dict[str, Number]] = {}
        self._began = time.perf_counter()

    @property
    def path(self) -> Path:
        """The run's folder, with its number."""
        return self._writer.path

    def log_scalar(self, name: str, value: float | int | Tensor, iteration: int, **_: Any) -> None:
        """Take a number, as nvdlfw-inspect hands it; a tensor is read on the writer's thread."""
        kept = value.detach().clone() if isinstance(value, Tensor) else float(value)
        self._waiting.setdefault(int(iteration), {})[name] = kept
        self._write_before(int(iteration) - LATE + 1)

    def step(self, step: int, **values: Number | None) -> None:
        """Note the loss, grad_norm, lr and other numbers of an iteration.

        Raises:
            RunLogError: Something is neither a number nor a tensor of one.
        """
        known = {name: checked(name, value) for name, value in values.items() if value is not None}
        self._losses.setdefault(step, {}).update(known)
        self._write_before(step - LATE + 1)

    def flush(self) -> None:
        """Write all there is; numbers of the same iterations that come later count as well."""
        self._write_before(None)
        self._writer.flush()

    def close(self, status: Status = "finished") -> None:
        """Write what is left and close the run. Later calls do nothing.

        Raises:
            RunLogError: There is no such status.
        """
        self._write_before(None)
        self._writer.close(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("finished" if kind is None else "interrupted" if interrupted else "failed")

    def _write_before(self, iteration: int | None) -> None:
        """Write the iterations before this one; None: all."""
        every = sorted({*self._waiting, *self._losses})
        for number in [i for i in every if iteration is None or i < iteration]:
            self._write(number, self._waiting.pop(number, {}), self._losses.pop(number, {}))

    def _write(self, number: int, statistics: dict[str, Number], losses: dict[str, Number]) -> None:
        timing = {"time_s": [time.perf_counter() - self._began]}

        @cache
        def rows() -> tuple[Columns, dict[str, float]]:
            return self._rows.casts(number, {n: float(v) for n, v in statistics.items()})

        def step() -> Columns:
            return step_columns(number, {**rows()[1], **losses}, timing)

        self._writer.add("casts", lambda: rows()[0])
        self._writer.add("sites", self._rows.new_sites)
        self._writer.add("events", self._rows.events)
        self._writer.add("steps", step)

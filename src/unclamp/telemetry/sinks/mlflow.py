"""A run's numbers in MLflow, in a run of its own or in the one that is already active."""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unclamp.runlog import Header, Status
from unclamp.telemetry.sinks.backend import Backend
from unclamp.telemetry.sinks.numbers import Histogram

STATES: Mapping[Status, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
BATCH = 1000
"""Numbers in one request, MLflow's limit."""
INTERVAL_S = 2.0
"""Seconds that numbers may wait for a request together: a server takes milliseconds for each."""
_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"


class MLflow(Backend):
    """Log to MLflow's tracking; the header becomes the artifact `unclamp.json`.

    An active run of the same tracking place (`mlflow.start_run`) is used and left open.

    Args:
        tracking: A folder, or a URI such as "http://host:5000" or "sqlite:///mlflow.db". What
            MLflow is set to by default.
        experiment: Name of the experiment, made where it does not exist.
        run_name: Name of the run; MLflow invents one by default.
        sites: Globs of modules whose sites get their own series.
        prefix: Before every name that does not begin with it, such as "fp8/".

    Raises:
        UnsupportedError: The package mlflow is not installed.
    """

    package = "mlflow"

    def __init__(
        self,
        tracking: str | Path | None = None,
        *,
        experiment: str = "unclamp",
        run_name: str | None = None,
        sites: str | Sequence[str] = (),
        prefix: str = "",
    ) -> None:
        super().__init__(sites=sites, prefix=prefix)
        self._tracking = tracking
        self._experiment = experiment
        self._run_name = run_name
        self._waiting: list[Any] = []
        self._sent = 0.0

    def close(self, status: Status) -> None:
        """Send what waits and end the run; a run that was active before stays active."""
        self._send()
        if self._is_own:
            self._client.set_terminated(self._run_id, STATES.get(status, "FAILED"))

    def _open(self, header: Header) -> None:
        import mlflow  # noqa: PLC0415  # an extra, and slow to import
        from mlflow.entities import Metric  # noqa: PLC0415

        self._metric = Metric
        tracking = _uri(self._tracking)
        active = mlflow.active_run()  # of this thread: why a sink starts in the foreground
        if tracking is not None and tracking != _uri(mlflow.get_tracking_uri()):
            active = None
        with _file_store_allowed(tracking):
            self._client = mlflow.MlflowClient(tracking_uri=tracking)
        self._is_own = active is None
        self._run_id = self._new_run() if active is None else active.info.run_id
        self._client.log_dict(self._run_id, header.to_dict(), "unclamp.json")

    def _new_run(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(self._experiment)
        )
        return self._client.create_run(experiment, run_name=self._run_name).info.run_id

    def _write(
        self, step: int, numbers: Mapping[str, float], found: Mapping[str, Histogram]
    ) -> None:
        now_ms = int(time.time() * 1e3)
        self._waiting += [
            self._metric(_allowed(name), value, now_ms, step) for name, value in numbers.items()
        ]
        if time.monotonic() - self._sent >= INTERVAL_S or len(self._waiting) >= BATCH:
            self._send()

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for first in range(0, len(waiting), BATCH):
            self._client.log_batch(self._run_id, metrics=waiting[first : first + BATCH])
        self._sent = time.monotonic()


def _uri(tracking: str | Path | None) -> str | None:
    """Return what MLflow takes: a URI as it is, a folder as an absolute file URI."""
    is_uri = isinstance(tracking, str) and ("://" in tracking or tracking == "databricks")
    return str(tracking) if is_uri else tracking and Path(tracking).resolve().as_uri()


def _allowed(name: str) -> str:
    """Return a name that MLflow takes, with `_` for what it refuses."""
    parts = (re.sub(r"[^\w\-. ]", "_", part) for part in name.split("/"))
    return "/".join(part for part in parts if part.strip(".")) or "_"


@contextmanager
def _file_store_allowed(tracking: str | None) -> Iterator[None]:
    """Let MLflow 3 open a folder, which it does on demand only: whoever names one demands it."""
    needed = tracking is not None and tracking.startswith("file:") and _FILE_STORE not in os.environ
    if needed:
        os.environ[_FILE_STORE] = "true"
    try:
        yield
    finally:
        if needed:
            del os.environ[_FILE_STORE]

"""Runs as tasks of a Ray cluster.

Ray decides where a run trains; a task takes one CPU. A worker that dies, or whose machine does, has
its run trained again from the beginning, and that is told: Ray's own retries are off, because
they are silent. Steps and losses travel by an actor, which workers also ask whether to stop.
"""

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from unclamp.errors import StudyError, UnclampError
from unclamp.study.loop import RunPlan
from unclamp.study.messages import Message, Note
from unclamp.study.pool import GRACE_S
from unclamp.study.ray_channel import Channel
from unclamp.study.ray_worker import Ended, Home, run

TRIES = 3
"""How often a run is begun whose workers die."""


class RayTasks:
    """Trains runs on a Ray cluster.

    Args:
        address: "auto" for the cluster that this machine is part of, or where one is; "local" for
            one on this machine alone.
        jobs: Runs side by side; as many as the cluster has CPUs without it.

    Raises:
        UnclampError: Ray is not installed.
    """

    def __init__(self, address: str, *, jobs: int | None = None) -> None:
        try:
            import ray  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise UnclampError(
                "--ray needs the package ray: install it with pip install 'unclamp[ray]'"
            ) from error
        self._ray: Any = ray
        self._address, self._jobs = address, jobs
        self._is_ours = False

    def hire(self, plans: list[RunPlan], tell: Callable[[Message], None]) -> "_Crew":
        """Connect to the cluster, and return tasks for these runs."""
        self._connect()
        return _Crew(self._ray, plans, tell, jobs=self._jobs or len(plans))

    def close(self) -> None:
        """Leave the cluster, and end one of our own."""
        if self._is_ours:
            self._ray.shutdown()

    def _connect(self) -> None:
        if self._ray.is_initialized():
            return
        more = {}
        if self._address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            more["include_dashboard"] = False
        try:
            self._ray.init(
                address=self._address, log_to_driver=False, logging_level="error", **more
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise StudyError(
                f"no Ray cluster can be used at {self._address!r} ({reason}): start one with "
                "`ray start --head` on this machine, or give --ray the address of one"
            ) from error
        self._is_ours = True


class _Crew:
    """Tasks, and the actor through which they tell what they do."""

    def __init__(
        self, ray: Any, plans: list[RunPlan], tell: Callable[[Message], None], *, jobs: int
    ) -> None:
        self._ray, self._tell, self._jobs = ray, tell, jobs
        self._waiting = list(plans)
        self._tries = {plan.path: 0 for plan in plans}
        self._running: dict[Any, RunPlan] = {}
        self._is_stopping = False
        self._mark = _mark(plans[0])
        self._home = Home.of(plans[0], self._mark)
        kept = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        self._channel = ray.remote(**kept)(Channel).remote()
        self._task = ray.remote(num_cpus=1, max_retries=0)(run)
        self._died = (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.ObjectLostError,
            ray.exceptions.LocalRayletDiedError,
        )

    def begin(self) -> None:
        """Hand in as many tasks as may run at a time; Ray has those wait that find no CPU."""
        while self._waiting and len(self._running) < self._jobs and not self._is_stopping:
            plan = self._waiting.pop(0)
            self._tries[plan.path] += 1
            tested = None if plan.rule is None else plan.backtest.read_bytes()
            self._running[self._task.remote(plan, tested, self._home, self._channel)] = plan

    def follow(self, seconds: float) -> bool:
        """As `Crew.follow`; a run whose worker died begins again."""
        done, _ = self._ray.wait(list(self._running), timeout=seconds)
        self._drain()
        for task in done:
            self._finish(task)
        self.begin()
        if self._running:
            return False
        self._drain()
        return True

    def ask_to_stop(self) -> None:
        """As `Crew.ask_to_stop`."""
        self._is_stopping = True
        self._channel.stop.remote()

    def has_ended(self, seconds: float) -> bool:
        """As `Crew.has_ended`; what interrupted runs recorded comes back too."""
        if self._running:
            self._channel.stop.remote()  # again: it forgets where its machine dies
            done, _ = self._ray.wait(list(self._running), timeout=seconds)
            for task in done:
                with suppress(Exception):  # one of them is being raised, or nobody wants them
                    self._finish(task)
            self._drain()
        if self._running:
            return False
        self._dismiss()
        return True

    def kill(self) -> None:
        """Kill the workers that are still training; tasks that wait for a CPU never begin."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=GRACE_S)
        self._dismiss()

    def _finish(self, task: Any) -> None:
        plan = self._running.pop(task)
        try:
            ended: Ended = self._ray.get(task)
        except self._died as error:
            self._begin_again(plan, error)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, UnclampError) else error) from None
        else:
            if ended.files is not None:
                shutil.rmtree(plan.path, ignore_errors=True)
            ended.save(plan.path)

    def _begin_again(self, plan: RunPlan, error: Exception) -> None:
        if self._tries[plan.path] >= TRIES:
            reason = str(error).splitlines()[0]
            raise StudyError(
                f"the workers of {plan.label} died {TRIES} times, the last one so: {reason}"
            ) from error
        if not self._is_stopping:
            self._tell(Note(text="its worker died; it is trained again", label=plan.label))
            self._waiting.insert(0, plan)

    def _drain(self) -> None:
        """Pass on what was told; all of what runs said that have ended is among it."""
        with suppress(self._ray.exceptions.GetTimeoutError, self._ray.exceptions.RayActorError):
            for message in self._ray.get(self._channel.take.remote(), timeout=GRACE_S):
                self._tell(message)

    def _dismiss(self) -> None:
        self._ray.kill(self._channel)
        self._mark.unlink(missing_ok=True)


def _mark(plan: RunPlan) -> Path:
    """Make the file by which workers see whether the study's folder is theirs too."""
    mark = plan.path.absolute().parents[2] / f".here-{uuid.uuid4().hex}"
    mark.touch()
    return mark

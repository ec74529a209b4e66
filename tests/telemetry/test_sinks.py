"""The sinks: what each service was given is read back with that service's own means."""

import contextvars
import json
import math
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import unclamp
from unclamp import UnclampWarning, UnsupportedError
from unclamp.runlog import Columns, Header, RunLogWriter, Status
from unclamp.telemetry import MLflow, Sink, Sinks, TensorBoard, WandB
from unclamp.telemetry.sinks import SiteInfo

# One worker imports wandb and mlflow, which takes longer than any of these tests.
pytestmark = pytest.mark.xdist_group("sinks")

HEADER = Header(unclamp_version="0", recipe={"input": {"scaling": "delayed"}}, git_commit="abc")
SITES: Columns = {
    "site": [0, 1],
    "fqn": ["layers.0.up", "head"],
    "role": ["input", "input"],
    "format": ["e4m3fn", "e4m3fn"],
    "scaling": ["delayed", "delayed"],
    "format_max": [448.0, 448.0],
}
CASTS: Columns = {
    "site": [0, 1],
    "amax": [2.0, 1.0],
    "scale": [448.0, 448.0],
    "elements": [100, 100],
    "saturated": [3, 0],
    "underflowed": [10, 0],
    "nonfinite": [0, 0],
    "recast": [0, 0],
    "saturated_error": [0.25, 0.0],
    "exponents": [[(-2, 40), (1, 60)], None],
}
UP = "unclamp/sites/layers.0.up/input"
UNTIL_CLOSE = ["start", "step 0", "step 1", "event spike"]


def steps(loss: float | None) -> Columns:
    return {"loss": [loss], "time_s": [0.0], "step_ms": [20.0], "scalars": [[("acc@1", 0.5)]]}


def record(sink: Sink, *, status: Status = "finished") -> None:
    """Give a sink a short run, its steps on another thread as the recorder does."""
    sinks = Sinks([sink])
    sinks.start(HEADER, SITES)

    def run() -> None:
        sinks.step(0, steps(2.5), CASTS)
        sinks.event(1, "switch", {"site": "a"})
        sinks.step(1, steps(math.nan), None)
        sinks.step(2, steps(math.inf), CASTS)

    on_thread(run)
    sinks.close(status)
    sinks.warn()
    assert len(sinks) == 1


def on_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


class Keeper:
    """A sink that keeps what it gets, and fails at what it is told to fail at."""

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at
        self.got: list[str] = []
        self.sites: Mapping[int, SiteInfo] = {}

    def start(self, header: Header, sites: Mapping[int, SiteInfo]) -> None:
        self.sites = sites
        self._got("start")

    def step(self, step: int, steps: Columns, casts: Columns | None) -> None:
        self._got(f"step {step}")

    def event(self, step: int, kind: str, data: Mapping[str, Any]) -> None:
        self._got(f"event {kind}")

    def close(self, status: Status) -> None:
        self._got(f"close {status}")

    def _got(self, what: str) -> None:
        self.got.append(what)
        if what == self.fails_at:
            raise OSError("disk full")


def give(sinks: Sinks) -> None:
    sinks.start(HEADER, SITES)
    for step in (0, 1):
        sinks.step(step, steps(1.0), CASTS)
    sinks.event(2, "spike", {})
    sinks.close("finished")


# The protocol and the many.


def test_a_sink_gets_a_run_from_start_to_close() -> None:
    keeper = Keeper()
    assert isinstance(keeper, Sink)
    give(Sinks([keeper]))
    assert keeper.got == [*UNTIL_CLOSE, "close finished"]
    assert [site.fqn for site in keeper.sites.values()] == ["layers.0.up", "head"]


def test_a_function_gets_every_steps_numbers() -> None:
    got: list[tuple[int, dict[str, float]]] = []
    give(Sinks([lambda step, numbers: got.append((step, numbers))]))
    assert [step for step, _ in got] == [0, 1]
    assert got[1][1]["loss"] == 1.0
    assert got[1][1]["unclamp/saturated"] == 3


@pytest.mark.parametrize(
    ("fails_at", "when", "got"),
    [
        ("start", "at its start", ["start"]),
        ("step 0", "at step 0", ["start", "step 0", "close failed"]),
        ("event spike", "at step 2", [*UNTIL_CLOSE, "close failed"]),
        ("close finished", "at its end", [*UNTIL_CLOSE, "close finished"]),
    ],
)
def test_a_failing_sink_costs_itself_only_and_is_named_once(fails_at, when, got) -> None:
    failing, other = Keeper(fails_at), Keeper()
    sinks = Sinks([failing, other])
    with pytest.warns(UnclampWarning, match=f"Keeper stopped {when}: OSError: disk full") as caught:  # noqa: PT031
        give(sinks)
        sinks.warn()
        sinks.warn()
    assert len(caught) == 1
    assert failing.got == got
    assert other.got == [*UNTIL_CLOSE, "close finished"]


def test_a_failure_on_the_writers_thread_neither_stops_the_log_nor_is_lost(tmp_path: Path) -> None:
    sinks = Sinks([Keeper("step 0")])
    sinks.start(HEADER, SITES)

    def row() -> Columns:
        sinks.step(0, steps(1.0), None)
        return {"step": [0], "time_s": [0.0]}

    with RunLogWriter(tmp_path / "run", header=HEADER) as writer:
        writer.add("steps", row)
        writer.flush()
        assert writer.failure is None
    with pytest.warns(UnclampWarning, match="Keeper stopped at step 0"):
        sinks.warn()


RUN: contextvars.ContextVar[str] = contextvars.ContextVar("run")
"""Where a tracker keeps its open run, as trackio does."""


class Tracker(Keeper):
    """A sink that opens its run in `start`, and needs it on the sinks' thread."""

    def start(self, header: Header, sites: Mapping[int, SiteInfo]) -> None:
        RUN.set(f"{RUN.get()}, opened by the sink")

    def step(self, step: int, steps: Columns, casts: Columns | None) -> None:
        self.got.append(f"{step}: {RUN.get()}")
        RUN.set(f"{RUN.get()}, seen")


def test_the_sinks_thread_sees_the_context_of_who_made_the_recorder(tmp_path: Path) -> None:
    """A tracker that keeps its open run in a context variable knows it on that thread."""
    got, tracker = [], Tracker()
    before = RUN.set("mine")
    try:
        with unclamp.Recorder(
            torch.nn.Linear(1, 1), tmp_path / "run", plain=True,
            sinks=[lambda step, numbers: got.append((step, RUN.get())), tracker],
        ) as recorder:  # fmt: skip
            recorder.step(loss=1.0)
            recorder.event("switched")
            RUN.set("another")
            recorder.step(loss=1.0)
    finally:
        RUN.reset(before)
    assert got == [(0, "mine, opened by the sink"), (1, "mine, opened by the sink, seen")]
    steps = [call for call in tracker.got if call[0].isdigit()]
    assert steps == ["0: mine, opened by the sink", "1: mine, opened by the sink, seen"]


def test_nothing_reaches_a_sink_after_close() -> None:
    keeper = Keeper()
    sinks = Sinks([keeper])
    give(sinks)
    sinks.step(3, steps(1.0), None)
    sinks.close("failed")
    assert keeper.got[-1] == "close finished"
    assert "step 3" not in keeper.got


def test_only_rank_0_reports_unless_a_sink_says_so() -> None:
    quiet, everywhere = Keeper(), Keeper()
    everywhere.every_rank = True  # type: ignore[attr-defined]
    give(Sinks([quiet, everywhere], rank=1))
    assert quiet.got == []
    assert everywhere.got[0] == "start"


@pytest.mark.parametrize("wrong", [TensorBoard, "tensorboard", 3])
def test_what_is_no_sink_is_refused(wrong: Any) -> None:
    with pytest.raises(UnsupportedError, match="expected a sink"):
        Sinks([wrong])


# The services.


@pytest.mark.parametrize("sink", [TensorBoard, WandB, MLflow])
def test_a_missing_package_is_an_error_when_the_sink_is_made(sink, tmp_path, monkeypatch) -> None:
    (tmp_path / "nowhere").mkdir()  # as ./wandb, which wandb leaves: not a package
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sink, "package", "nowhere")
    with pytest.raises(UnsupportedError, match=r"pip install 'unclamp\[nowhere\]'"):
        sink(**({"folder": "runs"} if sink is TensorBoard else {}))


def test_making_a_sink_imports_no_service() -> None:
    code = (
        "import sys; from unclamp.telemetry import MLflow, TensorBoard, WandB; "
        "TensorBoard('a'); WandB(project='b'); MLflow('c'); "
        "sys.exit(any(name in sys.modules for name in ('tensorboard', 'wandb', 'mlflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_glob_that_matches_no_site_is_said(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path, sites=["head", "nonsense"])
    with pytest.warns(UnclampWarning, match=r"\['nonsense'\] match no converted module"):
        sink.start(HEADER, {0: SiteInfo(site=0, fqn="head", role="input", format="e4m3fn",
                                        scaling="delayed", format_max=448.0)})  # fmt: skip
    sink.close("finished")


def test_tensorboard_shows_what_was_sent(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(TensorBoard(tmp_path, sites="layers.*"))
    read = EventAccumulator(str(tmp_path)).Reload()

    def series(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in read.Scalars(name)]

    (first, nan, inf) = series("loss")
    assert first == (0, 2.5)
    assert math.isnan(nan[1])
    assert inf == (2, math.inf)
    assert series("acc@1") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert series("unclamp/saturated") == [(0, 3), (2, 3)]
    assert series(f"{UP}/overshoot") == [(0, 2), (2, 2)]
    assert series("unclamp/events/switch") == [(1, 1)]
    assert not any("head" in tag for tag in read.Tags()["scalars"])
    histogram = read.Histograms(f"{UP}/exponents")[0].histogram_value
    assert (histogram.min, histogram.max, histogram.num) == (-2, 2, 100)
    assert list(histogram.bucket) == [40, 0, 0, 60]
    assert list(histogram.bucket_limit) == [-1, 0, 1, 2]
    (event,) = read.Tensors("unclamp/events/switch/text_summary")
    assert b'{"site": "a"}' in event.tensor_proto.string_val[0]
    (header,) = read.Tensors("unclamp/header/text_summary")
    assert b'"git_commit": "abc"' in header.tensor_proto.string_val[0]


def test_a_prefix_is_before_every_name_once(tmp_path: Path) -> None:
    """A trainer's own logger may write a `loss` into the same folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = {}
    for prefix in ("", "fp8/", "unclamp/"):
        folder = tmp_path / f"at {prefix}".replace("/", "")
        record(TensorBoard(folder, sites="layers.*", prefix=prefix))
        read = EventAccumulator(str(folder)).Reload().Tags()
        tags[prefix] = {kind: set(read[kind]) for kind in ("scalars", "histograms", "tensors")}
    assert {"loss", "acc@1", "unclamp/saturated", f"{UP}/overshoot"} < tags[""]["scalars"]
    for kind, plain in tags[""].items():
        assert tags["fp8/"][kind] == {f"fp8/{name}" for name in plain}
        bare = {name.removeprefix("unclamp/") for name in plain}
        assert tags["unclamp/"][kind] == {f"unclamp/{name}" for name in bare}


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    yield wandb
    wandb.teardown()


def wandb_records(folder: Path) -> list[Any]:
    """Return the records of an offline run's file: LevelDB's log format after 7 bytes."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service writes on after finish()
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, body, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits the end of a block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        body += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(wandb_internal_pb2.Record.FromString(body))  # type: ignore[attr-defined]
            body = b""
    return records


def wandb_history(folder: Path) -> dict[int, dict[str, Any]]:
    rows = [r.history.item for r in wandb_records(folder) if r.HasField("history")]
    values = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row}
        for row in rows
    ]
    return {row["_step"]: row for row in values}


def test_wandb_keeps_what_was_sent_and_says_nothing(wandb, tmp_path, capfd) -> None:
    record(WandB(project="fp8", mode="offline", sites="layers.*"), status="failed")
    history = wandb_history(tmp_path)
    assert list(history) == [0, 1, 2]
    assert history[0]["loss"] == 2.5
    assert math.isnan(history[1]["loss"])
    assert history[2]["loss"] == math.inf
    assert history[1]["unclamp/events/switch"] == 1
    assert history[1]["acc@1"] == 0.5
    assert history[2]["unclamp/saturated"] == 3
    assert history[0][f"{UP}/clamp_error"] == 0.25
    assert history[0][f"{UP}/exponents/values"] == [40, 0, 0, 60]
    assert history[0][f"{UP}/exponents/bins"] == [-2, -1, 0, 1, 2]
    records = wandb_records(tmp_path)
    configs = [u for r in records for u in r.config.update if u.key == "unclamp"]
    assert json.loads(configs[0].value_json)["git_commit"] == "abc"
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1]
    assert wandb.run is None
    assert capfd.readouterr() == ("", "")


def test_an_open_wandb_run_is_used_left_open_and_loses_nothing(wandb, tmp_path: Path) -> None:
    quiet = {"silent": True, "console": "off"}
    run = wandb.init(project="mine", settings=quiet)
    sinks = Sinks([WandB()])
    sinks.start(HEADER, SITES)
    for step in range(3):
        run.log({"mine": step})  # the caller's counter is one ahead of the step
        on_thread(lambda step=step: sinks.step(step, steps(1.0 + step), None))
    sinks.close("finished")
    assert wandb.run is run
    run.log({"mine": 3})
    run.finish()
    history = wandb_history(tmp_path)
    assert [row.get("mine") for row in history.values()] == [0, 1, 2, 3]
    assert [row.get("loss") for row in history.values()] == [None, 1, 2, 3]


def test_names_in_wandb_take_a_prefix(wandb, tmp_path: Path) -> None:
    record(WandB(project="fp8", mode="offline", prefix="fp8/"))
    names = [name for name in wandb_history(tmp_path)[0] if name[0] != "_"]
    assert {"fp8/loss", "fp8/unclamp/saturated"} < set(names)
    assert all(name.startswith("fp8/") for name in names)


def mlflow_series(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


@pytest.fixture
def mlflow_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    from mlflow import MlflowClient

    def client() -> Any:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        return MlflowClient(tracking_uri=(tmp_path / "ml").as_uri())

    return client


def test_mlflow_keeps_what_was_sent(mlflow_client, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    sink = MLflow(tmp_path / "ml", experiment="fp8", run_name="first", sites="layers.*")
    record(sink, status="interrupted")
    assert "MLFLOW_ALLOW_FILE_STORE" not in os.environ
    assert capfd.readouterr() == ("", "")
    client = mlflow_client()
    (run,) = client.search_runs([client.get_experiment_by_name("fp8").experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "KILLED")
    first, nan, inf = mlflow_series(client, run.info.run_id, "loss")
    assert first == (0, 2.5)
    assert math.isnan(nan[1])
    assert inf == (2, math.inf)
    assert mlflow_series(client, run.info.run_id, "acc_1")[0] == (0, 0.5)
    assert mlflow_series(client, run.info.run_id, f"{UP}/overshoot") == [(0, 2), (2, 2)]
    assert mlflow_series(client, run.info.run_id, "unclamp/events/switch") == [(1, 1)]
    header = Path(client.download_artifacts(run.info.run_id, "unclamp.json"))
    assert json.loads(header.read_text())["git_commit"] == "abc"


def test_names_in_mlflow_take_a_prefix(mlflow_client, tmp_path: Path) -> None:
    record(MLflow(tmp_path / "ml", prefix="fp8/"))
    client = mlflow_client()
    (run,) = client.search_runs([client.get_experiment_by_name("unclamp").experiment_id])
    assert {"fp8/loss", "fp8/acc_1", "fp8/unclamp/saturated"} < set(run.data.metrics)
    assert all(name.startswith("fp8/") for name in run.data.metrics)


def test_more_numbers_than_a_request_takes_are_all_kept(mlflow_client, tmp_path: Path) -> None:
    sink = MLflow(tmp_path / "ml")
    sinks = Sinks([sink])
    sinks.start(HEADER)
    many = [(f"x{i}", float(i)) for i in range(1100)]
    sinks.step(0, {"scalars": [many]}, None)
    sinks.close("finished")
    sinks.warn()
    client = mlflow_client()
    (run,) = client.search_runs([client.get_experiment_by_name("unclamp").experiment_id])
    assert run.data.metrics == dict(many)


def test_an_active_mlflow_run_is_used_and_left_active(mlflow_client, tmp_path: Path) -> None:
    client = mlflow_client()
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "ml").as_uri())
    try:
        with mlflow.start_run() as run:
            record(MLflow())
            active = mlflow.active_run()
            assert active is not None
            assert active.info.run_id == run.info.run_id
            assert client.get_run(run.info.run_id).info.status == "RUNNING"
            assert mlflow_series(client, run.info.run_id, "loss")[0] == (0, 2.5)
    finally:
        mlflow.set_tracking_uri(before)


def test_an_active_mlflow_run_elsewhere_is_let_be(mlflow_client, tmp_path: Path) -> None:
    client = mlflow_client()
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "elsewhere").as_uri())
    try:
        with mlflow.start_run() as run:
            record(MLflow(tmp_path / "ml"))
            assert mlflow.get_run(run.info.run_id).data.metrics == {}
    finally:
        mlflow.set_tracking_uri(before)
    assert client.get_experiment_by_name("unclamp") is not None

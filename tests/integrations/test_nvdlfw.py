"""nvdlfw-inspect's own files and logger calls, made a run log.

The files are written by nvdlfw-inspect itself: its FileLogger, and its LogTensorStats feature
through `debug_api`. Only the names of Transformer Engine's FP8 statistics are ours to write.
"""

import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvdlfw_inspect")

import nvdlfw_inspect.api as debug_api
from nvdlfw_inspect import logging as inspect_logging
from nvdlfw_inspect.logging import FileLogger, MetricLogger
from typer.testing import CliRunner

from unclamp import RunLog
from unclamp.analysis import run_curve
from unclamp.cli import app
from unclamp.errors import RunLogError
from unclamp.integrations.nvdlfw import UnclampLogger
from unclamp.integrations.nvdlfw_logs import FOLDER, find_logs, import_nvdlfw

STEPS = 30
LAYER = "model.layers.0.mlp.fc1"


@pytest.fixture(autouse=True)
def _no_loggers_are_left() -> Iterator[None]:
    yield
    debug_api.end_debug()
    MetricLogger.enabled_loggers.clear()
    statistics = logging.getLogger("Default Statistics")
    for own in (statistics, logging.getLogger("nvdlfw_inspect")):
        for handler in list(own.handlers):
            own.removeHandler(handler)
            handler.close()


def amax(step: int, tensor: str) -> float:
    base = {"activation": 3.0, "weight": 0.5, "gradient": 2e-5}[tensor]
    outlier = 20.0 if tensor == "activation" and step % 10 == 9 else 1.0
    return base * outlier * (1 + 0.01 * math.sin(step))


def scale_inv(step: int, tensor: str) -> float:
    """Return that of delayed scaling with a history of one update."""
    largest = 57344.0 if tensor == "gradient" else 448.0
    return amax(step - 1, tensor) / largest


def statistics(step: int, *, recipe: str = "fp8_delayed_scaling_") -> dict[str, float]:
    found = {}
    for tensor in ("activation", "weight", "gradient"):
        name = f"{LAYER}_{tensor}"
        found |= {
            f"{name}_cur_amax": amax(step, tensor),
            f"{name}_dynamic_range": 7.5,
            f"{name}_{recipe}scale_inv_min": scale_inv(step, tensor),
            f"{name}_{recipe}scale_inv_max": scale_inv(step, tensor),
            f"{name}_{recipe}underflows%": 0.25,
            f"{name}_{recipe}mse": 1e-7,
        }
    return found


def write_logs(folder: Path, *, steps: int = STEPS, **options: Any) -> None:
    """Have nvdlfw-inspect's logger write its file."""
    logger = FileLogger("nvdlfw_inspect", str(folder))
    logger._initialize_stats_logger(FOLDER)
    for step in range(steps):
        for name, value in statistics(step, **options).items():
            logger.log_scalar(name, value, step)
    for handler in list(logger.stats_logger.handlers):
        logger.stats_logger.removeHandler(handler)
        handler.close()


def write_curve(path: Path, *, steps: int = STEPS) -> Path:
    losses = [2.0 + 0.01 * math.sin(3 * step) + (1.5 if step == 20 else 0) for step in range(steps)]
    rows = "\n".join(f"{step},{loss},{2 * loss}" for step, loss in enumerate(losses))
    path.write_text(f"step,loss,grad_norm\n{rows}\n")
    return path


def truth(step: int, tensor: str) -> bool:
    limit = 61440.0 if tensor == "gradient" else 464.0
    return amax(step, tensor) / scale_inv(step, tensor) > limit


def rows_of(path: Path) -> dict[tuple[int, str], dict[str, Any]]:
    with RunLog.open(path) as log:
        rows = log.sql("SELECT * FROM casts JOIN sites USING (site, rank) WHERE rank = 0")
    return {(row["step"], row["role"]): row for row in rows.to_pylist()}


def test_a_folder_of_transformer_engine_becomes_a_run(tmp_path: Path):
    write_logs(tmp_path / "logs")
    found = import_nvdlfw(
        tmp_path / "logs", tmp_path / "run", curve=write_curve(tmp_path / "curve.csv")
    )
    assert (found.ranks, found.iterations, found.sites) == ([0], STEPS, 2)
    rows = rows_of(tmp_path / "run")
    for step in range(STEPS):
        row = rows[step, "input"]
        assert row["amax"] == pytest.approx(amax(step, "activation"), abs=5e-5)
        # four decimals of a scale_inv of 0.0067 are three quarters of a percent
        assert row["scale"] == pytest.approx(1 / scale_inv(step, "activation"), rel=8e-3)
        assert row["clamped"] == truth(step, "activation")
        assert (row["elements"], row["saturated"], row["underflowed"]) == (None, None, None)
        assert rows[step, "weight"]["format"] == "e4m3fn"
    assert sum(row["clamped"] is True for row in rows.values()) == 3
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.counts == "casts"
        curve = run_curve(log)
        scalars = dict(log.steps()["scalars"][4].as_py())
        assert {site.scaling for site in log.named_sites()} == {"delayed"}
    assert curve.series["loss"][20] == 2.0 + 0.01 * math.sin(60) + 1.5
    assert curve.series["grad_norm"][20] == 2 * (2.0 + 0.01 * math.sin(60) + 1.5)
    assert scalars[f"{LAYER}_activation_fp8_delayed_scaling_underflows%"] == 0.25


def test_what_four_decimals_destroy_is_counted_and_null(tmp_path: Path):
    write_logs(tmp_path / "logs")
    found = import_nvdlfw(tmp_path / "logs", tmp_path / "run")
    # gradients of 2e-5 and their scales, two ends each; weights' scales of 0.0011 stay; all mse
    assert found.zeros == {"amax": STEPS, "scale_inv": 2 * STEPS, "mse": 3 * STEPS}
    said = next(note for note in found.notes if "0.0000" in note)
    assert re.search(rf"{STEPS} of amax, {3 * STEPS} of mse and {2 * STEPS} of scale_inv", said)
    with RunLog.open(tmp_path / "run") as log:
        assert said in log.header.notes
    assert {role for _, role in rows_of(tmp_path / "run")} == {"input", "weight"}


def test_a_cast_within_the_rounding_of_its_numbers_is_unknown(tmp_path: Path):
    """0.5 over 0.0011 is 454.5, and what was rounded to them is anything from 435 to 476."""
    write_logs(tmp_path / "logs", steps=2)
    found = import_nvdlfw(tmp_path / "logs", tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [rows[step, "weight"]["clamped"] for step in (0, 1)] == [None, None]
    assert found.unknown == 2


def test_current_scaling_clamps_nothing(tmp_path: Path):
    write_logs(tmp_path / "logs", recipe="fp8_current_scaling_")
    import_nvdlfw(tmp_path / "logs", tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert {row["clamped"] for row in rows.values()} == {False}
    assert {row["scaling"] for row in rows.values()} == {"dynamic"}


def test_bionemos_folders_and_several_ranks(tmp_path: Path):
    """Each process was rank 0 to nvdlfw-inspect, which began before torch.distributed did."""
    for rank in (0, 1):
        write_logs(tmp_path / "logs" / f"rank_{rank}")
    found = import_nvdlfw(tmp_path / "logs", tmp_path / "run")
    assert found.ranks == [0, 1]
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.world_size == 2
        sites = log.sql("SELECT rank, bool_and(replicated) AS same FROM sites GROUP BY rank")
        totals = log.windows().totals
        assert {end.closed for end in log.ends()} == {"finished"}
    assert {row["rank"]: row["same"] for row in sites.to_pylist()} == {0: False, 1: True}
    # what both wrote alike, since the statistics were reduced, counts once
    assert sum(total.clamped_rows for total in totals) == 3


def test_the_last_of_two_files_of_a_rank_counts_for_what_both_have(tmp_path: Path):
    write_logs(tmp_path / "logs")
    file = next((tmp_path / "logs" / FOLDER).iterdir())
    assert file.name == "nvdlfw_inspect_globalrank-0.log"
    later = file.with_name("nvdlfw_inspect_20991231_000000_globalrank-0.log")
    line = file.read_text().splitlines()[0]
    later.write_text(re.sub(r"value=.*", "value=77.0000", line) + "\n")
    file.rename(file.with_name("nvdlfw_inspect_20251231_000000_globalrank-0.log"))
    import_nvdlfw(tmp_path / "logs", tmp_path / "run")
    assert rows_of(tmp_path / "run")[0, "input"]["amax"] == 77.0


def test_a_logging_frequency_is_a_cadence(tmp_path: Path):
    logger = FileLogger("nvdlfw_inspect", str(tmp_path))
    logger._initialize_stats_logger(FOLDER)
    for step in range(0, 40, 10):
        logger.log_scalar(f"{LAYER}_activation_cur_amax", 2.5, step)
    import_nvdlfw(tmp_path, tmp_path / "run")
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.cadence is not None
        assert log.header.cadence.casts.steps == 10
        assert log.casts()["scale"].to_pylist() == [None] * 4


def test_folders_that_hold_none_are_refused(tmp_path: Path):
    with pytest.raises(RunLogError, match=f"{FOLDER}/nvdlfw_inspect_globalrank-0.log; found none"):
        find_logs(tmp_path)
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / "nvdlfw_inspect_globalrank-0.log").write_text(
        "2025-01-01 00:00:00,1 - INFO - hello\n"
    )
    with pytest.raises(RunLogError, match="no line of a statistic"):
        import_nvdlfw(tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command(tmp_path: Path):
    write_logs(tmp_path / "logs")
    curve = write_curve(tmp_path / "curve.csv", steps=STEPS - 2)
    arguments = ["import", "nvdlfw", str(tmp_path / "logs"), "--curve", str(curve), "--out"]
    shown = CliRunner().invoke(app, [*arguments, str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert f"60 casts of 2 sites in {STEPS} iterations, of 1 rank" in shown.output
    assert f"2 of {STEPS} iterations have no loss in the curve" in shown.output
    told = CliRunner().invoke(app, [*arguments, str(tmp_path / "other"), "--json"])
    assert json.loads(told.stdout)["without_loss"] == 2
    again = CliRunner().invoke(app, [*arguments, str(tmp_path / "run")])
    assert isinstance(again.exception, RunLogError)


def test_reading_loads_no_torch():
    code = "import sys, unclamp.integrations.nvdlfw_logs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


CONFIG = """
stats:
  enabled: True
  layers:
    layer_name_regex_pattern: .*
  LogTensorStats:
    enabled: True
    tensors: [activation, gradient]
    stats: [min, max, mean]
"""


def test_a_logger_of_ours_keeps_all_digits(tmp_path: Path):
    """nvdlfw-inspect's own feature, driven through its API, with ours as `statistics_logger`."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    logger = UnclampLogger(tmp_path / "run")
    debug_api.initialize(str(config), statistics_logger=logger, log_dir=str(tmp_path))
    tensors = {}
    for step in range(6):
        for tensor in ("activation", "gradient"):
            x = tensors[step, tensor] = torch.randn(4, 8) * (1e-6 if tensor == "gradient" else 1.0)
            debug_api.log_tensor_stats(
                layer_name=LAYER, tensor_name=tensor, tensor=x, skip_reduction=True
            )
        name = f"{LAYER}_gradient_fp8_delayed_scaling_scale_inv_max"
        MetricLogger.log_scalar(name, 3e-11, step)
        logger.step(step, loss=torch.tensor(1.5 + step), lr=None)
        debug_api.step()
    logger.close()
    rows = rows_of(tmp_path / "run")
    for (step, tensor), x in tensors.items():
        row = rows[step, "input" if tensor == "activation" else "grad_output"]
        assert row["amax"] == float(x.abs().max())
        if tensor == "gradient":
            assert row["scale"] == pytest.approx(1 / 3e-11)
            assert row["clamped"] == bool(x.abs().max() / 3e-11 > 61440)
    with RunLog.open(tmp_path / "run") as log:
        steps = log.steps().to_pylist()
        assert log.header.status == "finished"
    assert [row["loss"] for row in steps] == [1.5 + step for step in range(6)]
    assert dict(steps[3]["scalars"])[f"{LAYER}_activation_mean"] == pytest.approx(
        float(tensors[3, "activation"].mean())
    )


def test_an_exception_closes_the_loggers_run_as_failed(tmp_path: Path):
    def fails() -> None:
        with UnclampLogger(tmp_path / "run") as logger:
            logger.log_scalar(f"{LAYER}_activation_cur_amax", 2.0, 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    with RunLog.open(tmp_path / "run") as log:
        assert (log.header.status, log.casts().num_rows) == ("failed", 1)


def test_the_names_are_those_of_nvdlfw_inspect():
    """What is relied on of it: the template of a line, and the names of folder and file."""
    source = Path(inspect_logging.__file__).read_text()
    assert '"{} \\t\\t\\t\\t iteration={:06d} \\t\\t\\t\\t value={:.4f}"' in source
    assert f'STATISTICS_LOG_DIR = "{FOLDER}"' in source
    assert '_globalrank-{rank}.log"' in source


@pytest.mark.parametrize("how", ["files", "logger"])
def test_tensors_with_inf_or_nan_are_named(how: str, tmp_path: Path):
    """Their amax has no place in a column, and is no more missing than wrong."""
    broken = {3: math.inf, 5: math.nan}
    told = {
        (step, name): value
        * (broken.get(step, 1.0) if name == f"{LAYER}_activation_cur_amax" else 1.0)
        for step in range(8)
        for name, value in statistics(step).items()
        if name.endswith(("cur_amax", "scale_inv_max"))
    }
    if how == "logger":
        with UnclampLogger(tmp_path / "run") as logger:
            for (step, name), value in told.items():
                logger.log_scalar(name, value, step)
    else:
        files = FileLogger("nvdlfw_inspect", str(tmp_path / "logs"))
        files._initialize_stats_logger(FOLDER)
        for (step, name), value in told.items():
            files.log_scalar(name, value, step)
        import_nvdlfw(tmp_path / "logs", tmp_path / "run")
    with RunLog.open(tmp_path / "run") as log:
        events = log.sql("SELECT step, kind, data FROM events ORDER BY step").to_pylist()
    assert [(event["step"], event["kind"]) for event in events] == [
        (3, "nonfinite"),
        (5, "nonfinite"),
    ]
    for event in events:
        assert json.loads(event["data"]) == {"sites": [{"fqn": LAYER, "role": "input"}]}
    rows = rows_of(tmp_path / "run")
    assert [rows[step, "input"]["amax"] for step in (3, 5)] == [None, None]
    assert [rows[step, "input"]["clamped"] for step in (3, 5)] == [None, None]

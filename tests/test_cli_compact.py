"""`unclamp compact` as a user types it."""

import json
from pathlib import Path

from test_cli import assert_one_clear_line, unclamp
from test_cli_associate import STEPS
from unclamp.runlog import Header, RunLog, RunLogWriter


def write_run(path: Path) -> Path:
    """Write a site that clamps in every tenth step from 5 on."""
    with RunLogWriter(path, header=Header(unclamp_version="0")) as writer:
        same = {"fqn": ["a"], "role": ["input"], "format": ["e4m3fn"], "scaling": ["delayed"]}
        writer.add("sites", {"site": [0], "format_max": [448.0], **same})
        counts = dict.fromkeys(("underflowed", "nonfinite", "recast"), [0] * STEPS)
        steps, clamped = range(STEPS), [int(step % 10 == 5) for step in range(STEPS)]
        writer.add("steps", {"step": steps, "time_s": [0.0] * STEPS})
        ones = [1.0] * STEPS
        own = {"saturated": clamped, "saturated_error": [0.1 * c for c in clamped]}
        fixed = {"amax": ones, "scale": ones, "elements": [9] * STEPS, "microsteps": [1] * STEPS}
        writer.add("casts", {"step": steps, "site": [0] * STEPS, **own, **fixed, **counts})
    return path


def test_it_says_what_it_would_free_and_then_frees_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    keep = ("--keep", "recent=50", "--keep", "every=100", "--keep", "near=0")
    gone = STEPS - 50 - (STEPS - 50) // 10 - len(range(0, STEPS - 50, 100))
    tried = unclamp("compact", str(run), *keep, "--dry-run")
    assert tried.returncode == 0, tried.stderr
    assert tried.stdout.startswith("Would free about ")
    assert f"Of {STEPS} rows of casts {gone:,} would be left out." in tried.stdout
    assert "Kept before step 350: one step in 100, 0 steps on both sides" in tried.stdout
    done = unclamp("compact", str(run), *keep)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Freed ")
    assert f"{gone:,} were left out" in done.stdout
    assert "KiB of " in done.stdout
    assert ": 1 part became 1." in done.stdout
    weaker = unclamp("compact", str(run), "--keep", "recent=90", "--keep", "every=50").stdout
    assert weaker.endswith(
        f"Of {STEPS - gone} rows of casts the rule leaves out none.\nWhat was left out before does "
        "not come back. Kept before step 350: one step in 100, 0 steps on both sides of each spike "
        "and event, and every cast that clamped, overshot, was cast again, held Inf or NaN, or was "
        "inspected.\n"
    )
    again = json.loads(unclamp("compact", str(run), *keep, "--json").stdout)
    assert (again["rows"], again["kept"]) == (STEPS - gone, STEPS - gone)
    assert again["is_done"] is True
    with RunLog.open(run) as log:
        assert log.sql("SELECT count(*) AS n FROM casts WHERE saturated > 0")["n"][0].as_py() == 40
        assert log.sql("SELECT sum(steps) AS n FROM summaries")["n"][0].as_py() == STEPS


def test_a_weaker_rule_after_a_stricter_one_does_not_say_that_it_kept_more(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    unclamp("compact", str(run), "--keep", "recent=200", "--keep", "every=100", "--keep", "near=0")
    weaker = ("compact", str(run), "--keep", "recent=50", "--keep", "every=2", "--keep", "near=0")
    gone = sum(step % 2 != 0 and step % 10 != 5 for step in range(200, 350))
    rules = (
        "Kept before step 350: what each of these rules keeps: before step 200 one step in 100, "
        "and 0 steps on both sides of each spike and event; before step 350 one step in 2, and 0 "
    )
    for answer in (unclamp(*weaker, "--dry-run").stdout, unclamp(*weaker).stdout):
        assert f"{gone} were left out" in answer or f"{gone} would be left out" in answer
        assert rules in answer
    with RunLog.open(run) as log:
        left = log.sql("SELECT step FROM casts ORDER BY step")["step"].to_pylist()
    expected = [
        step
        for step in range(STEPS)
        if step >= 350 or step % 10 == 5 or (step % 2 == 0 and (step >= 200 or step % 100 == 0))
    ]
    assert left == expected
    page = json.loads(unclamp("report", str(run), "--json").stdout)
    (said,) = (note for note in page["notes"] if "were thinned" in note)
    assert "before step 200 one step in 100" in said
    assert "before step 350 one step in 2" in said


def test_a_log_that_is_too_short_to_thin_says_so(tmp_path: Path) -> None:
    said = unclamp("compact", str(write_run(tmp_path / "run")), "--keep", "every=4").stdout
    assert f"Of {STEPS} rows of casts the rule leaves out none: the last 100,000 steps" in said


def test_the_page_says_that_steps_are_thinned_and_has_the_totals_of_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = json.loads(unclamp("report", str(run), "--json").stdout)
    unclamp("compact", str(run), "--keep", "recent=50", "--keep", "near=0")
    after = json.loads(unclamp("report", str(run), "--json").stdout)
    assert sum("thinned" in note for note in after["notes"]) == 1
    assert not any("thinned" in note for note in before["notes"])
    assert after["run"]["sites"] == before["run"]["sites"]


def test_what_cannot_be_compacted_is_one_clear_line(tmp_path: Path) -> None:
    assert_one_clear_line(unclamp("compact", str(tmp_path)), "is not a run")
    run = write_run(tmp_path / "run")
    assert_one_clear_line(unclamp("compact", str(run), "--keep", "every"), "whole number of steps")
    for command in ("compact", "explain"):
        done = unclamp(command, "s3://bucket/run")
        assert_one_clear_line(done, "`aws s3 sync s3://bucket/run FOLDER`")

"""Each trap does on this torch what is documented of it, by the experiment's own arithmetic."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unclamp
from patience import PATIENCE_S
from unclamp.traps import TRAPS, Outcome, Trap, run
from unclamp.traps.running import SKIPPED, torch_version

BESIDE = [trap for trap in TRAPS if trap.ranks or trap.apart]
HERE = [trap for trap in TRAPS if trap not in BESIDE and "cpu" in trap.devices]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """All traps, run once as a user runs them: some here, some in processes."""
    return {outcome.name: outcome for outcome in run(TRAPS, devices=["cpu"], patience_s=PATIENCE_S)}


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_trap_behaves_as_documented(trap: Trap, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[trap.name]
    assert not outcome.is_bad, (outcome.facts, outcome.differences, outcome.reason)
    if trap.documented_for(torch_version(), ("cpu",)) is None:
        assert outcome.verdict == SKIPPED
        assert outcome.reason
    elif outcome.verdict != SKIPPED:
        assert outcome.facts
        assert outcome.differences == ()


def test_only_what_needs_a_gpu_is_skipped_here(outcomes: dict[str, Outcome]) -> None:
    skipped = {name for name, outcome in outcomes.items() if outcome.verdict == SKIPPED}
    assert skipped == {"tensor-core-accumulation"}
    assert outcomes["tensor-core-accumulation"].reason == "torch sees no CUDA device"


def test_every_fact_is_documented_and_every_documented_fact_is_found(
    outcomes: dict[str, Outcome],
) -> None:
    for outcome in outcomes.values():
        assert list(outcome.expected) == list(outcome.facts)
    for trap in TRAPS:
        for each in trap.documented:
            assert list(each.expected) == list(trap.documented[0].expected)
            assert not trap.telling or trap.telling in each.expected


@pytest.mark.parametrize("trap", HERE, ids=lambda trap: trap.name)
def test_what_is_shown_runs_when_pasted_and_finds_the_same(
    trap: Trap, outcomes: dict[str, Outcome]
) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(trap.code, trap.name, "exec"), {"__name__": "pasted"})
    for name, fact in outcomes[trap.name].facts.items():
        shown = re.escape(repr(name)) + ": " + re.escape(repr(fact).strip("'"))
        assert re.search(shown, printed.getvalue().replace(": '", ": ")), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("local-maximum", ["{'amax.item()': 2.0", "{'amax.item()': 100.0"]),
        pytest.param("trainer-nan-filter", ["on': '[0.0, 0.0, 0.0, 0.0]'"], marks=pytest.mark.slow),
    ],
    ids=["ranks", "trainer"],
)
def test_what_needs_processes_runs_when_pasted(
    name: str, expected: list[str], tmp_path: Path
) -> None:
    (trap,) = (trap for trap in TRAPS if trap.name == name)
    script = tmp_path / "pasted.py"
    script.write_text(trap.code, encoding="utf-8")
    paths = [str(Path(unclamp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [sys.executable, "-W", "ignore", str(script)]
    if trap.ranks:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={trap.ranks}"]
        command = [sys.executable, *launch, str(script)]
    done = subprocess.run(
        command, env=os.environ | meeting | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for said in expected:  # two ranks may print at once, one within the other
        assert said in done.stdout


def test_what_is_shown_fits_a_terminal() -> None:
    for trap in TRAPS:
        lines = trap.code.splitlines()
        assert max(map(len, lines)) <= 80, trap.name
        assert len(lines) <= 40, trap.name
        assert "pyright" not in trap.code
        assert "noqa" not in trap.code


def test_experiments_leave_the_users_random_numbers_and_settings_alone() -> None:
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run(HERE, devices=["cpu"])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert float(torch.tensor(2e-36) / 448) != 0  # denormals are not flushed


def test_versions_do_not_overlap_and_leave_no_gap() -> None:
    """For each device something is documented of a torch once, from some version on."""
    for trap in TRAPS:
        for device in {each.device for each in trap.documented}:
            said = [
                [each.holds_for((2, minor), (device,)) for each in trap.documented].count(True)
                for minor in range(11, 20)
            ]
            assert max(said) == 1
            assert sorted(said) == said, trap.name

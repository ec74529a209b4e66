"""The command, its JSON and its exit code; the page of the docs; what the doctor says of traps."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import unclamp.traps.findings as findings_module
from typed import unclamp
from unclamp.doctor import diagnose, probe_device
from unclamp.doctor.experiments import TrapAnswer, quick_traps
from unclamp.doctor.kernels import gemm_of, kernels_by_scaling
from unclamp.doctor.pasted import paragraph
from unclamp.doctor.sentences import sentences
from unclamp.numerics.gpu.gemm import Given
from unclamp.report.traps import print_findings
from unclamp.traps import TRAPS, Documented, catalogue, find, run
from unclamp.traps.findings import findings
from unclamp.traps.page import MARK, with_traps

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "traps.md"


def test_a_name_prints_its_screen_and_ends_with_0() -> None:
    done = unclamp("traps", "floor-log2")
    assert done.returncode == 0, done.stderr
    (trap,) = find("floor-log2")
    assert trap.code.strip() in done.stdout
    words = " ".join(done.stdout.split())
    assert trap.belief in words
    assert "wrong exponents = 196" in words
    assert "1 experiment: 1 as documented." in words
    assert trap.cost in words
    assert trap.see in words


def test_a_glob_prints_screens_and_a_table_of_80_columns() -> None:
    done = unclamp("traps", "*-scale")
    assert done.returncode == 0, done.stderr
    assert "3 experiments: 3 as documented." in done.stdout
    assert done.stdout.count("believed") == 3
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "unclamp: running 3 experiments, in less than a minute" in done.stderr
    assert "unclamp traps NAME" not in done.stdout


def test_json_is_one_document() -> None:
    done = unclamp("traps", "*-cast", "--json")
    found = json.loads(done.stdout)
    assert list(found) == ["build", "behave", "traps"]
    assert found["behave"] is True
    assert [trap["name"] for trap in found["traps"]] == ["plain-cast", "gradient-cast"]
    assert {"belief", "truth", "code", "documented", "cost", "remedy", "see", "outcome"} <= set(
        found["traps"][0]
    )
    assert found["traps"][0]["outcome"]["facts"]["e5m2: Inf"] == 28_702


def test_list_names_all_and_runs_none() -> None:
    done = unclamp("traps", "--list")
    assert done.returncode == 0
    assert all(trap.name in done.stdout for trap in TRAPS)
    assert "as documented" not in done.stdout
    assert len(json.loads(unclamp("traps", "--list", "--json").stdout)) == len(TRAPS)


def test_a_misspelt_name_is_one_clear_line() -> None:
    done = unclamp("traps", "plain-kast")
    assert (done.returncode, done.stdout) == (2, "")
    named = "no trap is called 'plain-kast' (`unclamp traps --list` names all)"
    assert done.stderr == f"unclamp: {named}; did you mean 'plain-cast'?\n"
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> str:
    """A trap of which something else is documented than what this torch does."""
    (trap,) = find("micro-batches")
    wrong = replace(trap, documented=(Documented(expected={"elements that differ": 0.0}),))
    traps = tuple(wrong if each is trap else each for each in TRAPS)
    monkeypatch.setattr(catalogue, "TRAPS", traps)
    monkeypatch.setattr(findings_module, "TRAPS", traps)
    return trap.name


def test_a_torch_that_changed_ends_with_1_and_is_told_with_both_figures(changed: str) -> None:
    done = unclamp("traps", changed)
    assert done.returncode == 1
    words = " ".join(done.stdout.split())
    assert "not as documented" in words
    assert re.search(r"but elements that differ: 0\.\d+, documented 0", words)
    found = unclamp("traps", changed, "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["behave"] is False


def test_among_many_only_what_is_not_as_documented_has_a_screen() -> None:
    traps = [*find("plain-cast"), *find("micro-batches")]
    outcomes = run(traps, devices=["cpu"])
    outcomes[1] = replace(outcomes[1], verdict="failed", reason="RuntimeError: moon")
    out = io.StringIO()
    print_findings(findings(outcomes), Console(file=out, width=80), screens=False)
    assert out.getvalue().count("believed") == 1
    assert "RuntimeError: moon" in out.getvalue()
    assert "2 experiments: 1 as documented, 1 failed." in out.getvalue()


def test_the_page_is_what_the_code_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_traps(text) == text, "run: python -m unclamp.traps.page docs/traps.md"


def test_the_page_keeps_what_is_written_by_hand() -> None:
    assert with_traps(f"mine\n{MARK}old").startswith(f"mine\n{MARK}\n## Casts")
    for wrong in ("no mark", MARK * 2):
        with pytest.raises(ValueError, match="expected one line"):
            with_traps(wrong)


def test_pages_that_traps_name_exist() -> None:
    for trap in TRAPS:
        if trap.see.startswith("docs/"):
            assert (ROOT / trap.see).exists(), trap.name
        else:
            assert trap.see.startswith("unclamp."), trap.name


def test_the_doctor_takes_its_verdicts_from_the_traps() -> None:
    cpu = probe_device("cpu")
    assert [trap.name for trap in cpu.traps] == [trap.name for trap in quick_traps("cpu")]
    assert len(cpu.traps) >= 15
    assert not any(trap.is_bad for trap in cpu.traps)
    bad = TrapAnswer(name="planted", verdict="not as documented", detail="1, not 2", is_bad=True)
    worse = replace(cpu, traps=(*cpu.traps, bad))
    said = "cpu: planted does not behave as documented for this torch (1, not 2)"
    assert said in " ".join(sentences([worse]))
    assert said not in " ".join(sentences([cpu]))
    assert paragraph({"torch": "2"}, [worse]).endswith("not as documented: planted.")


def test_the_paragraph_is_one_and_names_nothing_of_the_user() -> None:
    found = diagnose()
    assert "\n" not in found.paragraph
    assert f"torch {found.build['torch']}" in found.paragraph
    assert "to e5m2: gives Inf" in found.paragraph
    assert "all as documented." in found.paragraph
    assert str(Path.home()) not in found.paragraph


def test_kernels_are_told_for_each_scaling_and_granularity() -> None:
    answers = kernels_by_scaling("cpu")
    pairs = {(answer.scaling, answer.granularity) for answer in answers}
    assert len(answers) == len(pairs) == 16
    assert {scaling for scaling, _ in pairs} == {"dynamic", "delayed", "guarded", "static"}
    assert all(answer.output == "float32, of dequantised values" for answer in answers)


def test_the_gemms_of_a_hopper_gpu_are_those_that_would_run(monkeypatch) -> None:
    """As `numerics.gpu.gemm` decides, which its own tests hold: here only its words."""
    monkeypatch.setattr("unclamp.doctor.kernels.architecture", lambda device: "sm_90")
    e4m3, e5m2 = (lambda grain, name=name: Given(name, grain) for name in ("e4m3fn", "e5m2"))
    assert gemm_of("cuda", e4m3("tensor"), e4m3("tensor")) == "scaled_mm, scales of tensors"
    assert gemm_of("cuda", e5m2("row"), e4m3("row")) == "scaled_mm, scales of rows"
    assert gemm_of("cuda", e4m3("1x128"), e4m3("128x128")) == "scaled_mm, scales of blocks"
    mx = gemm_of("cuda", e4m3("mx"), e4m3("mx"))
    assert mx == "bfloat16, of dequantised values: torch multiplies no scales of mx by mx here"

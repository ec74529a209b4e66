"""Whoever misspells a name, an argument or a key is told the nearest that exists."""

# pyright: reportCallIssue=false

import inspect
from pathlib import Path

import pytest
import torch

import unclamp
from unclamp import Delayed, Dynamic, Guarded, HighPrecision, PerRow, Recipe, Static
from unclamp.analysis import find_spikes
from unclamp.errors import did_you_mean, naming_arguments
from unclamp.runlog import Header, RunLogWriter
from unclamp.study.config import StudyConfig, default_toml


def model() -> torch.nn.Module:
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    unclamp.convert(layers, Recipe())
    return layers


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("dynamc", ["dynamic", "delayed"], "; did you mean 'dynamic'?"),
        ("DYNAMIC", ["Dynamic"], "; did you mean 'Dynamic'?"),
        ("xyz", ["dynamic"], ""),
        (None, ["dynamic"], ""),
        ("", [], ""),
    ],
)
def test_the_nearest_name_is_shown_as_it_is_written(name, known, expected):
    assert did_you_mean(name, known) == expected


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Recipe(inputs=Dynamic()), r"Recipe\(\) has no argument 'inputs'.*mean 'input'"),
        (lambda: Recipe().override("a", inpt=Dynamic()), "'inpt'.*did you mean 'input'"),
        (lambda: Delayed(histroy_len=4), "'histroy_len'.*did you mean 'history_len'"),
        (lambda: Guarded(magin=4), "did you mean 'margin'"),
        (lambda: Dynamic(granularty=PerRow()), "did you mean 'granularity'"),
        (lambda: Static(scal=1.0), "did you mean 'scale'"),
        (lambda: unclamp.switch(model(), "0", inptu=Dynamic()), "did you mean 'input'"),
        (lambda: unclamp.convert(model(), Recipe(), skp=["0"]), "did you mean 'skip'"),
        (lambda: unclamp.observe(torch.nn.Linear(2, 2), skipp=[]), "did you mean 'skip'"),
        (lambda: unclamp.Recorder(model(), "run", overwite=True), "did you mean 'overwrite'"),
        (lambda: unclamp.explain_spike("run", biuld=len), "did you mean 'build'"),
    ],
)
def test_a_misspelt_argument(act, message):
    with pytest.raises(TypeError, match=message):
        act()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Recipe(input="dynamc"), "did you mean 'dynamic'"),
        (lambda: Recipe.uniform("HighPrecision"), "did you mean 'high_precision'"),
        (lambda: Recipe(grad_weight="high_precison"), r"grad_weight.*or HighPrecision\(\)"),
        (lambda: Recipe().override("a", weight="gaurded"), "did you mean 'guarded'"),
        (lambda: unclamp.switch(model(), "0", input="delaid"), "did you mean 'delayed'"),
        (lambda: unclamp.switch(model(), "O", input="delayed"), "matches no converted layer"),
        (lambda: Recipe(input="static"), "static scaling needs its scale"),
    ],
)
def test_a_misspelt_scaling_or_layer(act, message):
    with pytest.raises(unclamp.UnclampError, match=message):
        act()


def test_a_misspelt_status_table_or_column(tmp_path: Path):
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="0")) as writer:
        with pytest.raises(unclamp.RunLogError, match="did you mean 'finished'"):
            writer.close("finnished")  # pyright: ignore[reportArgumentType]
        with pytest.raises(unclamp.RunLogError, match="did you mean 'casts'"):
            writer.add("cast", {})
        with pytest.raises(unclamp.RunLogError, match="did you mean 'loss'"):
            writer.add("steps", {"step": [0], "los": [1.0]})


def test_a_misspelt_definition_of_a_spike():
    with pytest.raises(unclamp.AnalysisError, match="did you mean 'robust'"):
        find_spikes([1.0, 2.0], method="robst")


def test_a_misspelt_column_of_a_curve(tmp_path: Path):
    (tmp_path / "curve.csv").write_text("step,train/loss\n0,1.0\n", encoding="utf-8")
    with pytest.raises(unclamp.AnalysisError, match="did you mean 'train/loss'"):
        unclamp.analysis.read_curve(tmp_path / "curve.csv", column="train/los")  # pyright: ignore


def test_a_misspelt_arm_to_start_from():
    data = StudyConfig.from_toml(default_toml()).to_dict()
    data["arms"]["mixed"]["from"] = "delayd"
    with pytest.raises(unclamp.StudyError, match="did you mean 'delayed'"):
        StudyConfig.from_dict(data)


def test_a_misspelt_name_of_the_package():
    with pytest.raises(AttributeError, match="did you mean 'Recorder'"):
        unclamp.Recoder  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_the_signature_of_what_is_wrapped_stays():
    names = list(inspect.signature(Recipe).parameters)
    assert names[:3] == ["input", "weight", "grad_output"]
    assert "history_len" in inspect.signature(Delayed).parameters

    @naming_arguments
    def add(one: int, *, two: int = 2) -> int:
        return one + two

    assert add(1) == 3
    assert add(1, two=3) == 4
    with pytest.raises(TypeError, match="did you mean 'two'"):
        add(1, tow=3)  # pyright: ignore[reportCallIssue]


# ---- the obvious first argument, and names in place of scalings ------------------------------


def test_the_obvious_first_argument_needs_no_name():
    assert Delayed(16) == Delayed(history_len=16)
    assert Guarded(3) == Guarded(history_len=3)
    assert Static(0.5) == Static(scale=0.5)
    assert Dynamic(PerRow()) == Dynamic(granularity=PerRow())
    assert Delayed(16).history_len == 16
    assert Static(0.5).scale == 0.5


@pytest.mark.parametrize("act", [lambda: Delayed(4, "max"), lambda: Guarded(4, "max")])
def test_the_other_arguments_do(act):
    with pytest.raises(TypeError, match="positional"):
        act()


def test_a_name_stands_for_a_scaling_with_its_defaults():
    assert Recipe(input="dynamic") == Recipe(input=Dynamic())
    assert Recipe(input="dynamic") == Recipe.from_toml('input = {scaling = "dynamic"}')
    assert Recipe.uniform("guarded") == Recipe.uniform(Guarded())
    named = Recipe().override("a", scaling="dynamic", weight="high_precision")
    assert named == Recipe().override("a", scaling=Dynamic(), weight=HighPrecision())
    assert Recipe(input="dynamic").input == Dynamic()


def test_high_precision_can_be_named_for_a_gemm():
    assert Recipe(output="high_precision") == Recipe(output=HighPrecision())
    named = Recipe().override("a", grad_weight="high_precision")
    assert named == Recipe().override("a", grad_weight=HighPrecision())


def test_a_switch_takes_a_name():
    (report,) = unclamp.switch(model(), "1", input="dynamic").switched.values()
    assert report == {"input": (Delayed(), Dynamic())}

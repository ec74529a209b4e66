"""Scenario `labels`: which labels are left, which settings are refused, what a study says of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unclamp.errors import StudyError
from unclamp.report.html import write_page
from unclamp.report.view import build_view
from unclamp.report.words import ARM_COLUMNS, arm_columns, arm_row
from unclamp.runlog import RunLog
from unclamp.study.arms import run_study
from unclamp.study.config import OptimizerConfig, StudyConfig, default_toml
from unclamp.study.data import IGNORED, Batches, read_text
from unclamp.study.labels import with_few_labels
from unclamp.study.loop import RunPlan, train
from unclamp.study.models import build_model, check_study

SMALL = {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2}


def config(**changes: Any) -> StudyConfig:
    base = StudyConfig.from_toml(default_toml()).to_dict()
    return StudyConfig.from_dict({**base, **changes})


def small(**changes: Any) -> StudyConfig:
    return config(model=SMALL, data={"batch_size": 2, "seq_len": 32}, **{"steps": 4} | changes)


def losses(path: Path) -> list[float]:
    with RunLog.open(path) as log:
        return log.steps()["loss"].to_pylist()


@pytest.mark.parametrize("labels", [1, 3, 4, 7, 8, 20, 35])
def test_of_each_sequence_the_last_labels_are_left_and_all_together_as_many_as_asked(
    labels: int,
) -> None:
    tokens = torch.arange(50).reshape(5, 10)
    same, masked = with_few_labels((tokens, tokens.clone()), labels=labels)
    wanted = [[IGNORED] * 10 for _ in range(5)]
    # One at a time to each sequence in turn, from its end on.
    for n in range(labels):
        row, back = n % 5, n // 5 + 1
        wanted[row][-back] = row * 10 + 10 - back
    assert masked.tolist() == wanted
    assert torch.equal(same, tokens)


def test_the_batch_that_it_is_made_of_keeps_its_labels() -> None:
    tokens = torch.arange(20).reshape(2, 10)
    labels = tokens.clone()
    with_few_labels((tokens, labels), labels=3)
    assert torch.equal(labels, tokens)


@pytest.mark.parametrize(("labels", "digits"), [(4, (2, 2)), (3, (2, 1)), (1, (1, 0))])
def test_with_a_question_the_labels_are_the_last_digits_of_how_many_words_come_before_it(
    labels: int, digits: tuple[int, int]
) -> None:
    texts = [b"one two\nthree  4 five six seven " * 3, b" a bb c d e f g h i j k l mm" * 3]
    tokens = torch.tensor([list(text[:80]) for text in texts])
    asked, masked = with_few_labels((tokens, tokens.clone()), labels=labels, question=" N? ")
    for row, number in enumerate(digits):
        shown = bytes(asked[row].tolist())
        if not number:
            assert torch.equal(asked[row], tokens[row])
            assert masked[row].tolist() == [IGNORED] * 80
            continue
        before, answer = shown[:-number], shown[-number:]
        text = texts[row][: 80 - 4 - number]
        assert before == text + b" N? "
        words = 0
        for at, byte in enumerate(text):  # a word begins at a letter after a gap
            words += byte not in b" \n" and (at == 0 or text[at - 1] in b" \n")
        assert int(answer) == words % 10**number
        assert masked[row].tolist() == [IGNORED] * (80 - number) + list(answer)
    assert torch.equal(tokens, torch.tensor([list(text[:80]) for text in texts]))


@pytest.mark.parametrize(
    ("steps", "labels", "message"),
    [
        (20, {}, "no step with few labels in 20 steps.*--steps 21 or more"),
        (3, {"every": 3}, "no step with few labels in 3 steps.*--steps 4 or more"),
        (9, {"every": 1}, "expected 2 or more"),
        (21, {"labels": 8 * 127}, "fewer than the 1016 targets of an ordinary batch.*got 1016"),
        (21, {"question": "How many wörds?"}, "in ASCII"),
        (21, {"question": "?" * 127}, "leave room for a text before it"),
    ],
)
def test_a_scenario_without_few_label_steps_or_few_labels_is_refused(
    steps: int, labels: dict[str, int], message: str, tmp_path: Path
) -> None:
    study = config(scenarios=["labels"], steps=steps, labels=labels)
    with pytest.raises(StudyError, match=message):
        run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "labels", [{}, {"every": 2}, {"question": "?" * 126}, {"labels": 8 * 127 - 1}]
)
def test_the_nearest_settings_that_are_not_refused(labels: dict[str, int]) -> None:
    check_study(config(scenarios=["labels"], steps=21, labels=labels))


@pytest.mark.parametrize("labels", [{"labels": 0}, {"every": 0}, {"every": "two"}, {"label": 8}])
def test_bad_values_of_its_section_are_refused_when_read(labels: dict[str, object]) -> None:
    with pytest.raises(StudyError, match="labels"):
        config(labels=labels)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of both scenarios that have marked steps, of one seed and three arms."""
    out = tmp_path_factory.mktemp("labels") / "out"
    arms = small().to_dict()["arms"]
    study = small(
        steps=11,
        scenarios=["labels", "outlier"],
        seeds=[0],
        labels={"every": 3, "labels": 2, "question": " Words? "},
        outlier={"first_step": 5},
        arms={name: arms[name] for name in ("hp", "dynamic", "delayed")},
    )
    run_study(study, out, jobs=1)
    return out


def test_its_losses_are_means_over_the_few_labels_and_its_run_says_which_steps(tiny: Path) -> None:
    run = tiny / "labels" / "hp" / "seed-0"
    with RunLog.open(run) as log:
        events = log.sql("SELECT step FROM events WHERE kind = 'few-label' ORDER BY step")
        groups = log.sql('SELECT step, "group" FROM steps ORDER BY step').to_pylist()
        assert log.header.metadata["few_label_steps"] == [3, 6, 9]
        assert "planted_steps" not in log.header.metadata
    assert events["step"].to_pylist() == [3, 6, 9]
    assert [r["step"] for r in groups if r["group"] == "few labels"] == [3, 6, 9]
    assert {r["group"] for r in groups if r["step"] not in (3, 6, 9)} == {None}


def test_a_few_label_loss_is_that_of_the_model_before_the_step_at_these_labels(
    tmp_path: Path,
) -> None:
    """By hand: plain torch on the first weights, and the cross entropy of two bytes."""
    study = small(scenarios=["labels"], labels={"every": 1, "labels": 2})
    torch.manual_seed(0)
    model = build_model(study.model)
    text = np.frombuffer(read_text((), seq_len=32), dtype=np.uint8)
    tokens, _ = Batches(text, batch_size=2, seq_len=32, seed=0).batch(1)
    still = replace(study, optimizer=OptimizerConfig(lr=0.0))
    train(
        RunPlan(
            config=still, scenario="labels", arm="hp", seed=0, recipe=None, path=tmp_path / "run"
        )
    )
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:, -2]
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, -1]).item()
    assert losses(tmp_path / "run")[1] == pytest.approx(expected, rel=1e-6)


def test_table_verdict_and_page_name_the_few_label_steps_and_those_of_the_other_scenario(
    tiny: Path,
) -> None:
    view = build_view(tiny)
    labels, outlier = sorted(view.scenarios, key=lambda scenario: scenario.name)
    assert (labels.planted, labels.mark) == ([3, 6, 9], "few-label")
    assert (outlier.planted, outlier.mark) == ([5], "planted")
    assert arm_columns(labels)[3:5] == [
        "loss at few-label steps vs dynamic",
        "spikes, all seeds: few-label + other",
    ]
    assert arm_columns(outlier) == list(ARM_COLUMNS)
    said = " ".join(view.verdict)
    assert "At the 3 few-label steps (scenario labels)" in said
    assert "At the planted step (scenario outlier)" in said
    assert "few-label steps left out (scenario labels)" in said
    ratio = dict(zip(arm_columns(labels), arm_row(labels.arms[0], labels), strict=True))
    runs = {arm: losses(tiny / "labels" / arm / "seed-0") for arm in ("hp", "dynamic")}
    own = [runs["hp"][step] / runs["dynamic"][step] for step in (3, 6, 9)]
    assert ratio["loss at few-label steps vs dynamic"].startswith(
        f"{np.exp(np.mean(np.log(own))):.2f}x"
    )
    page = write_page(view, tiny / "page.html").read_text(encoding="utf-8")
    assert "dotted: a few-label step" in page
    assert "dotted: a planted step" in page


def test_a_run_of_it_says_that_few_label_steps_are_left_out(tiny: Path) -> None:
    run = build_view(tiny / "labels" / "delayed" / "seed-0").run
    assert run is not None
    assert (run.planted, run.mark) == ([3, 6, 9], "few-label")
    assert any("few-label ones left out" in sentence for sentence in run.sentences)

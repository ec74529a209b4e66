"""Scenario `labels`: which labels are left, which settings are refused, what a study says of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from test_study_runs import config, losses, small
from unclamp.errors import StudyError
from unclamp.report import render
from unclamp.report.view import build_view
from unclamp.runlog import RunLog
from unclamp.study.arms import run_study
from unclamp.study.data import IGNORED, Batches
from unclamp.study.labels import with_few_labels
from unclamp.study.models import check_study


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

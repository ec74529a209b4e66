"""Each shape that trainers print: all of its records, the planted spike, and what was left out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from truths import printed
from truths.printed import EPOCH, ONSET, RECORDS, losses
from unclamp.analysis import find_spikes, read_curve

Shape = Callable[[float, int], str]
THROUGH: list[tuple[Shape, int, int]] = [
    (printed.nanochat, 0, 1), (printed.nanochat_sft, 0, 1), (printed.modded_nanogpt, 0, 1),
    (printed.llmc_old, 0, 1), (printed.llmc_main_log, 0, 1), (printed.megatron_validates, 0, 1),
    (printed.nemo, 0, 1), (printed.deepspeed, 0, 1), (printed.torchtitan_plain, 0, 1),
    (printed.trl, 0, 1), (printed.trainer_with_bar, 0, 1), (printed.tqdm_postfix, 0, 1),
    (printed.tqdm_description, 0, 1), (printed.mmcv_by_iteration, 50, 50),
    (printed.fairseq_json, 1, 1), (printed.fairseq_simple, 1, 1), (printed.olmo, 0, 1),
    (printed.olmo_core, 0, 1), (printed.litgpt, 1, 1), (printed.lit_gpt, 0, 1),
    (printed.tensors, 0, 1), (printed.loguru, 0, 1), (printed.epochs_only, 0, 1),
    (printed.composer, 0, 1), (printed.estimator, 0, 1), (printed.maxtext, 0, 1),
    (printed.detectron2, 0, 1), (printed.sentence, 0, 1), (printed.parts, 0, 1),
    (printed.below_heading, 0, 1),
]  # fmt: skip
"""Shape, its first step, and the distance between steps."""
ANEW: list[tuple[Shape, str]] = [
    (printed.tqdm_of_epochs, "epoch 4, step 20"), (printed.lightning_bar, "epoch 3, step 20"),
    (printed.mmengine, "epoch 4, step 1050"), (printed.mmcv, "epoch 4, step 1050"),
    (printed.torchvision, "epoch 3, step 20"), (printed.imagenet, "epoch 3, step 20"),
    (printed.timm, "epoch 3, step 20"), (printed.mnist, "epoch 4, step 12800"),
    (printed.cifar, "epoch 4, step 42000"), (printed.tutorial, "epoch 4, Step 21"),
    (printed.lightning_rich, "epoch 3, step 20"),
    (printed.headed, "epoch 4, batch 20"), (printed.keras_bar, "epoch 4, step 21"),
]  # fmt: skip
"""Shape that counts steps anew in each epoch, and what it calls record 200."""
NO_LINES_LEFT_OUT = {
    printed.nanochat, printed.llmc_main_log, printed.nemo, printed.deepspeed, printed.tqdm_postfix,
    printed.tqdm_description, printed.lightning_bar, printed.mmengine, printed.mmcv_by_iteration,
    printed.olmo, printed.olmo_core, printed.cifar, printed.tutorial, printed.headed,
    printed.keras_bar, printed.tensors, printed.loguru, printed.epochs_only,
    printed.trainer_with_bar, printed.composer, printed.maxtext, printed.detectron2,
    printed.lightning_rich,
}  # fmt: skip
"""Shapes without lines of evaluations that have a loss."""


def write(path: Path, shape: Shape) -> Path:
    text = "\n".join(shape(x, i) for i, x in enumerate(losses()))
    path.write_text(f"using world size: 8\n> building tokenizer ...\n{text}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(("shape", "first", "every"), THROUGH)
def test_a_shape_whose_steps_count_through(
    tmp_path: Path, shape: Shape, first: int, every: int
) -> None:
    curve = read_curve(write(tmp_path / "log", shape))
    assert curve.steps.tolist() == [first + every * i for i in range(RECORDS)]
    assert curve.series["loss"] == pytest.approx(losses(), rel=2e-3)
    (spike,) = find_spikes(curve.series["loss"], steps=curve.steps)
    assert (spike.onset, spike.peak) == (first + every * ONSET, first + every * (ONSET + 1))
    left_out = [note for note in curve.notes if "evaluation" in note]
    assert bool(left_out) is (shape not in NO_LINES_LEFT_OUT)


@pytest.mark.parametrize(("shape", "place"), ANEW)
def test_a_shape_whose_steps_are_counted_anew(tmp_path: Path, shape: Shape, place: str) -> None:
    curve = read_curve(write(tmp_path / "log", shape))
    assert curve.steps.tolist() == list(range(RECORDS))
    assert curve.series["loss"] == pytest.approx(losses(), rel=2e-3)
    (spike,) = find_spikes(curve.series["loss"], steps=curve.steps)
    assert (spike.onset, spike.peak) == (ONSET, ONSET + 1)
    assert curve.places[ONSET] == place
    left_out = [note for note in curve.notes if "evaluation" in note]
    lines = RECORDS // EPOCH
    assert left_out == (
        [] if shape in NO_LINES_LEFT_OUT else [f"{lines} lines of evaluations were left out."]
    )

"""A step of the study's default model, one thread, recorder on, against the arm `hp`.

In a study one step of twenty gets a closer look at every cast: that step is timed, too. What
snapshots cost a step of it `python -m bench.explain` tells.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import unclamp
from bench.timing import compare
from unclamp.study.config import StudyConfig, default_toml
from unclamp.study.data import Batches, read_text
from unclamp.study.loop import INSPECT, build_model, tokenize

ROUNDS = 41


def measure() -> dict[str, dict[str, float]]:
    """Time steps of every arm side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the study's workers
    try:
        with tempfile.TemporaryDirectory() as folder:
            recorders: list[unclamp.Recorder] = []
            kinds = (unclamp.Delayed(), unclamp.Guarded(), unclamp.Dynamic())
            runs = {"hp": _step(None, Path(folder) / "hp", recorders)}
            for kind in kinds:
                recipe = unclamp.Recipe.uniform(kind)
                runs[kind.kind] = _step(recipe, Path(folder) / kind.kind, recorders)
            looked = "delayed, a closer look at each cast"
            recipe = unclamp.Recipe.uniform(unclamp.Delayed())
            every = unclamp.Every(steps=1)
            runs[looked] = _step(recipe, Path(folder) / "looked", recorders, every)
            results = compare(
                "a step of the study's model, recorder on",
                runs,
                target={kind.kind: 1.25 for kind in kinds},
                rounds=ROUNDS,
            )
            for recorder in recorders:
                recorder.close()
            return results
    finally:
        torch.set_num_threads(threads)


def _step(
    recipe: unclamp.Recipe | None,
    path: Path,
    recorders: list[unclamp.Recorder],
    inspect: unclamp.Every = INSPECT,
) -> Callable[[], None]:
    config = StudyConfig.from_toml(default_toml())
    torch.manual_seed(0)
    model = build_model(config.model)
    if recipe is not None:
        unclamp.convert(model, recipe, skip=config.model.skip)
    shape = {"batch_size": config.data.batch_size, "seq_len": config.data.seq_len}
    text = read_text((), seq_len=config.data.seq_len)
    batches = Batches(tokenize(config.model, model, text), **shape, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorder = unclamp.Recorder(model, path, inspect=inspect, plain=recipe is None)
    recorders.append(recorder)
    count = iter(range(1 << 30))

    def run() -> None:
        tokens, labels = batches.batch(next(count))
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recorder.step(loss=loss, grad_norm=norm)

    return run


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.study", description=__doc__).parse_args()
    measure()

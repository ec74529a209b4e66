"""Snapshots on disk: written whole or not at all, read back bit for bit.

    RUN/snapshots/step-000060-to-000068/
        tensors/       every tensor of the state and of the batches (torch.distributed.checkpoint)
        skeleton.pt    what holds them together: dicts, lists and numbers, without code
        snapshot.json  step, losses, scaling of each site, code and machine: `Snapshot.facts`

A snapshot is written to a folder of another name and renamed, so a folder of the right name is
complete. Nothing in one can run code when it is read. What several ranks write is in `parts`.
"""

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from unclamp.errors import ReplayError
from unclamp.explain.parts import (
    FACTS_FILE,
    FOLDER,
    Part,
    begin,
    mark,
    name_of,
    part_of,
    remove_part,
)
from unclamp.explain.snapshot import Snapshot, decode, encode
from unclamp.explain.training import Batch
from unclamp.files import write_atomically

SKELETON_FILE = "skeleton.pt"
TENSORS_FOLDER = "tensors"
SCHEMA_VERSION = 1


def write_snapshot(run: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot below a run's folder, of several ranks this one's part; return its folder.

    Raises:
        ReplayError: The state or a batch holds an object that cannot be written.
        OSError: The disk does not take it; nothing is left behind.
    """
    _be_quiet()
    tensors: dict[str, Tensor] = {}
    batches = {step: [b.tree, list(b.devices)] for step, b in snapshot.batches.items()}
    skeleton = {
        "state": encode(snapshot.state, "the state", tensors),
        "batches": encode(batches, "a batch", tensors),
    }
    facts = {
        **snapshot.facts,
        "schema_version": SCHEMA_VERSION,
        "step": snapshot.step,
        "last_step": snapshot.last_step,
        # Exact, also for losses that JSON has no number for.
        "losses": {str(step): float(loss).hex() for step, loss in snapshot.losses.items()},
        "tensors": {key: [list(t.shape), str(t.dtype)[6:]] for key, t in tensors.items()},
    }
    whole = run / FOLDER / name_of(snapshot.step, snapshot.last_step)
    own = part_of(facts)
    final = whole if own.count == 1 else whole / own.folder
    part = final.parent / f".{final.name}.part"
    if final is not whole:
        begin(whole)
        remove_part(whole, own)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        save(tensors, checkpoint_id=part / TENSORS_FOLDER, no_dist=True)
        torch.save(skeleton, part / SKELETON_FILE)
        _sync(part / SKELETON_FILE)
        # NaN is refused here and not made null: the arguments go back into the build function.
        write_atomically(part / FACTS_FILE, json.dumps(facts, allow_nan=False).encode())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if final is not whole:
        mark(whole)
    return whole


def read_snapshot(path: Path, *, rank: int = 0) -> Snapshot:
    """Read a snapshot's folder; of one of several ranks the part of this one.

    Raises:
        ReplayError: It is not one, is another version's, or is damaged.
    """
    _be_quiet()
    facts, whole = read_facts(path), path
    if part_of(facts).count > 1:
        path = whole / Part(rank=rank, count=1).folder
        launch, facts = part_of(facts).launch, read_facts(path)
        if part_of(facts).launch != launch:
            raise ReplayError(f"the snapshot {whole} is damaged: its parts are of two launches")
    tensors = {
        key: torch.empty(shape, dtype=getattr(torch, dtype))
        for key, (shape, dtype) in facts.pop("tensors").items()
    }
    try:
        load(tensors, checkpoint_id=path / TENSORS_FOLDER, no_dist=True)
        skeleton = torch.load(path / SKELETON_FILE, weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ReplayError(f"the snapshot {path} is damaged: {first}") from error
    batches = decode(skeleton["batches"], tensors)
    return Snapshot(
        step=facts["step"],
        state=decode(skeleton["state"], tensors),
        batches={step: Batch(tree, tuple(devices)) for step, (tree, devices) in batches.items()},
        losses={int(step): float.fromhex(loss) for step, loss in facts.pop("losses").items()},
        facts=facts,
        path=whole,
    )


def read_facts(path: Path) -> dict[str, Any]:
    """Read what a snapshot says of itself, without its tensors.

    Raises:
        ReplayError: As `read_snapshot`.
    """
    try:
        facts = json.loads((path / FACTS_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ReplayError(f"{path} is no snapshot of unclamp: {error}") from error
    if not isinstance(facts, dict):
        raise ReplayError(f"{path} is no snapshot of unclamp: {FACTS_FILE} holds no object")
    if facts.get("schema_version") != SCHEMA_VERSION:
        raise ReplayError(
            f"the snapshot {path} was written by unclamp {facts.get('unclamp_version')}, which "
            "this version cannot read; install that one"
        )
    if not all(type(facts.get(name)) is int for name in ("step", "last_step")):
        raise ReplayError(f"{path} is no snapshot of unclamp: {FACTS_FILE} names no steps")
    return facts


def find_snapshots(run: Path) -> list[Path]:
    """Return the folders of a run's snapshots in the order of their steps; none if none."""
    return sorted(path.parent for path in (run / FOLDER).glob(f"step-*/{FACTS_FILE}"))


def read_all_facts(run: Path) -> tuple[dict[Path, dict[str, Any]], tuple[str, ...]]:
    """Return what each of a run's snapshots says of itself, and notes on those left out.

    Raises:
        ReplayError: There are some, and none can be read.
    """
    found: dict[Path, dict[str, Any]] = {}
    failures: list[ReplayError] = []
    for path in find_snapshots(run):
        try:
            found[path] = read_facts(path)
        except ReplayError as error:
            failures.append(error)
    if failures and not found:
        raise failures[0]
    return found, tuple(f"A snapshot was left out: {error}." for error in failures)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _be_quiet() -> None:
    """Silence what torch says of a single process, and nothing else.

    Not as a context: the writer's thread would restore filters that others have changed since.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
